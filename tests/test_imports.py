"""The house rules: two leaves and one trunk, heavy packages only where they belong, a quick command."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("model", "pipelines", "slurm") for p in (ROOT / package).rglob("*.py"))


def _imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
    return names


def _packages(path: Path) -> set[str]:
    return {name.partition(".")[0] for name in _imported(path)}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_follow_the_house_rules(path: Path) -> None:
    packages = _packages(path)
    leaf = path.relative_to(ROOT).parts[0]
    if leaf in ("model", "slurm"):
        assert not packages & ({"model", "pipelines", "slurm"} - {leaf}), "a leaf imports nothing of Braid"
    if leaf == "model":
        # Triton comes with torch's CUDA builds; only files named for it, which are imported on CUDA alone, may need it.
        kernels = {"triton"} if path.name.startswith("triton_") else set()
        assert packages <= set(sys.stdlib_module_names) | {"torch", "model", "flash_attn"} | kernels, "pure PyTorch"
    if leaf != "slurm":
        assert "submitit" not in packages, "submitit is imported by slurm/ alone"
    allowed = {ROOT / "pipelines/tokenize/pool.py", ROOT / "slurm/ray_cluster.py"}
    if path not in allowed:
        assert "ray" not in packages, "ray is imported by the tokenize job and the Ray-on-SLURM module alone"
    assert len(path.read_text().splitlines()) <= 400, "split by concept"


def test_nothing_imports_the_command_line() -> None:
    for path in FILES:
        if path.parent.name != "cli":
            assert not any(name.startswith("pipelines.cli") for name in _imported(path))


@pytest.mark.parametrize(
    "module", ["pipelines.sequence", "pipelines.interleave", "pipelines.cli", "pipelines.loading", "pipelines.pretrain"]
)
def test_light_modules_load_without_ray_submitit_and_deltalake(module: str) -> None:
    code = f"import sys, {module}; print([m for m in ('ray', 'submitit', 'deltalake') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, pipelines.cli; print([m for m in ('torch', 'numpy', 'pyarrow', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "[]"


def test_the_job_without_ray_finds_all_that_it_imports_of_ray() -> None:
    script = "from benchmarks import tokenize_without_ray as b; b._without_ray(); import pipelines.tokenize.pool"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
