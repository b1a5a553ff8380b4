"""The README speaks the truth: every command in it runs, in its order, on a corpus of the kind it describes."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.pipelines.tiny import write_stamp

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def commands() -> list[str]:
    """The indented `braid ...` lines, comments off."""
    return [shlex.join(shlex.split(line, comments=True)) for line in re.findall(r"^    (braid .*)$", README, re.M)]


def snippets(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_targets_that_the_readme_names_exist() -> None:
    listed = subprocess.run(["make", "help"], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    for target in re.findall(r"^    make ([a-z-]+)", README, re.M):
        assert re.search(rf"^{target}\s", listed, re.M)


def test_the_files_that_the_readme_names_exist() -> None:
    for target in re.findall(r"\]\(([^)h][^)]*)\)", README):
        assert (ROOT / target).exists(), target


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_command_of_the_readme_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for index in range(18):
        write_stamp(tmp_path / "raw" / "animals", f"cat{index:02}", rng)
    books = tmp_path / "raw" / "books"
    books.mkdir()
    lines = (json.dumps({"text": f"A short story about cat number {n}. " * 9}) for n in range(60))
    (books / "stories.jsonl").write_text("\n".join(lines) + "\n")
    for recipe in snippets("yaml"):
        (tmp_path / recipe.partition("\n")[0].removeprefix("# ")).write_text(recipe)
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for command in commands():
        done = subprocess.run(command, shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    for code in snippets("python"):
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, f"{code}\n{done.stderr}"
    assert (tmp_path / "animals.html").stat().st_size > 10_000
    assert {path.suffix for path in (tmp_path / "look").iterdir()} >= {".txt"}
