"""Sections of a benchmark, each in a process of its own with a time limit, so that one that fails takes no other with it.

Enters: the benchmark's module, which runs one section when called with `--run NAME --option JSON`. Leaves: the section's own
records, and one that says how long it took and what went wrong. Always holds: of a section that is over its limit no
process is left, those included that it started to compile.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from typing import Any

from benchmarks.training.records import record


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What the process of one section is told."""
    parser.add_argument("--run", help=argparse.SUPPRESS)
    parser.add_argument("--option", default="{}", help=argparse.SUPPRESS)


def start(
    module: str,
    section: str,
    arguments: argparse.Namespace,
    option: dict[str, Any],
    passed: Sequence[str],
    limit_s: float,
) -> None:
    """Run a section; whatever happens to it is a record.

    Args:
        passed: names of the arguments that the section is given; those that are None or False are left out.
        limit_s: unless the option names a `limit_s` of its own.
    """
    began = time.perf_counter()
    command = [sys.executable, "-m", module, "--run", section, "--option", json.dumps(option)]
    for name in passed:
        value = getattr(arguments, name)
        if value is not None and value is not False:
            command += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    environment = os.environ | {
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "PYTHONUNBUFFERED": "1",
        # flash-attn-4 compiles its kernels on first use: once for all sections.
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
    }
    limit_s = option.get("limit_s", limit_s)
    print(f"== {section} {option or ''}", flush=True)
    error = None
    # A file rather than a pipe: a pipe would stay open for as long as any process that the section started.
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, env=environment, stderr=errors, text=True, start_new_session=True)
        try:
            code = process.wait(limit_s)
            error = f"exit {code}: {_tail(errors, 1500)}" if code else None
        except subprocess.TimeoutExpired:
            error = f"over its limit of {limit_s} s; {_tail(errors, 300)}"
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    record(arguments.out, section, "took", seconds=round(time.perf_counter() - began, 1), option=option, error=error)


def _tail(file: Any, characters: int) -> str:
    file.seek(0)
    return file.read()[-characters:]
