"""FlashAttention 2 from its source, only as far as Braid uses it: `python -m benchmarks.build_flash_attn --out FOLDER`.

The package ships no wheels, and all of it takes an hour on many cores. This compiles what `model/attention.py` calls
(bfloat16, head sizes 64 and 128, one architecture; no dropout, ALiBi, windows or soft caps), in some minutes, with `nvcc`
against an installed torch, or one that lies elsewhere. Then, on a machine with such a GPU:

    PYTHONPATH=FOLDER pytest -m gpu tests/model/test_backends.py
    PYTHONPATH=FOLDER python -m benchmarks.train_step --sections check,attention --backends flash_attn,varlen
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE = "flash_attn-2.8.3.post2"
HEAD_SIZES = (64, 128)
LEFT_OUT = ("DROPOUT", "ALIBI", "UNEVEN_K", "SOFTCAP", "LOCAL")
ALLOWED = ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS")
NAME = "flash_attn_2_cuda"
LIBRARIES = ("c10", "c10_cuda", "torch_cpu", "torch_cuda", "torch_python")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the package, to be put on PYTHONPATH")
    parser.add_argument("--sdist", type=Path, help=f"{SOURCE}.tar.gz, as it lies on PyPI; else pip fetches it")
    parser.add_argument("--torch", type=Path, help="folder of the torch to build for; the installed one by default")
    parser.add_argument(
        "--python", type=Path, help="folder with Python.h of that torch's Python; this one's by default"
    )
    parser.add_argument("--suffix", default=sysconfig.get_config_var("EXT_SUFFIX"), help="of that Python's modules")
    parser.add_argument("--arch", default="90", help="compute capability")
    parser.add_argument("--jobs", type=int, default=2, help="compilers at a time; each takes some 4 GB")
    arguments = parser.parse_args()
    arguments.torch = arguments.torch or _installed_torch()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        with tarfile.open(arguments.sdist or fetched(folder)) as archive:
            archive.extractall(folder, filter="data")
        csrc = folder / SOURCE / "csrc"
        trim(csrc / "flash_attn" / "src")
        objects = compiled(csrc, folder, arguments)
        arguments.out.mkdir(parents=True, exist_ok=True)
        library = arguments.out / f"{NAME}{arguments.suffix}"
        # Named, so that it finds them: Python loads torch's libraries without giving their symbols to others.
        linked = [f"-L{arguments.torch / 'lib'}", *(f"-l{name}" for name in LIBRARIES)]
        subprocess.run(["nvcc", "-shared", "-o", library, *objects, *linked], check=True)
        shutil.copytree(folder / SOURCE / "flash_attn", arguments.out / "flash_attn", dirs_exist_ok=True)
        # So that it counts as installed.
        named = arguments.out / f"{SOURCE}.dist-info"
        named.mkdir(exist_ok=True)
        name, _, version = SOURCE.partition("-")
        (named / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        print(f"{library}: {library.stat().st_size / 1e6:.0f} MB")


def fetched(folder: Path) -> Path:
    name, _, version = SOURCE.partition("-")
    pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "--no-build-isolation"]
    subprocess.run([*pip, "-d", folder, f"{name}=={version}"], check=True)
    return folder / f"{SOURCE}.tar.gz"


def trim(src: Path) -> None:
    """Leave only our types and head sizes to the switches that instantiate everything."""
    switches = src / "static_switch.h"
    text = switches.read_text()
    text, halves = re.subn(r"if \(COND\) \{ +\\\n +using elem_type = cutlass::half_t;", _only_bfloat16, text)
    cases = " else ".join(
        f"if (HEADDIM <= {size}) {{ constexpr static int kHeadDim = {size}; return __VA_ARGS__(); }}"
        for size in HEAD_SIZES
    )
    ours = f"#define HEADDIM_SWITCH(HEADDIM, ...) [&] {{ {cases} }}()\n"
    text, switched = re.subn(r"#define HEADDIM_SWITCH.*", ours, text, flags=re.DOTALL)
    if (halves, switched) != (1, 1):
        raise SystemExit(f"{switches}: not as {SOURCE} has it; adapt this script")
    switches.write_text(text)


def _only_bfloat16(match: re.Match[str]) -> str:
    return match[0].replace("half_t", "bfloat16_t")


def compiled(csrc: Path, folder: Path, arguments: argparse.Namespace) -> list[Path]:
    """Object files of the interface and of each kernel that is left."""
    source = csrc / "flash_attn"
    include = [source, source / "src", csrc / "cutlass" / "include", arguments.torch / "include"]
    include += [arguments.torch / "include" / "torch" / "csrc" / "api" / "include"]
    include += [arguments.python or Path(sysconfig.get_paths()["include"])]
    options = ["-O3", "-std=c++17", "-Xcompiler", "-fPIC"]
    options += [f"-DTORCH_EXTENSION_NAME={NAME}", "-DTORCH_API_INCLUDE_EXTENSION_H"]
    options += [f"-DFLASHATTENTION_DISABLE_{name}" for name in LEFT_OUT]
    options += [f"-U__CUDA_NO_{name}__" for name in ALLOWED]
    options += ["--expt-relaxed-constexpr", "--expt-extended-lambda", "--use_fast_math", "-w"]
    options += [f"-gencode=arch=compute_{arguments.arch},code=sm_{arguments.arch}", *(f"-I{path}" for path in include)]
    kernels = [
        source / "src" / f"flash_{what}_hdim{size}_bf16_{causal}sm80.cu"
        for what in ("fwd", "fwd_split", "bwd")
        for size in HEAD_SIZES
        for causal in ("causal_", "")
    ]

    def compile(file: Path) -> Path:
        made = folder / f"{file.stem}.o"
        subprocess.run(["nvcc", *options, "-c", file, "-o", made], check=True)
        print(file.name, flush=True)
        return made

    with ThreadPoolExecutor(arguments.jobs) as pool:
        return list(pool.map(compile, [source / "flash_api.cpp", *kernels]))


def _installed_torch() -> Path:
    import torch

    return Path(torch.__file__).parent


if __name__ == "__main__":
    main()
