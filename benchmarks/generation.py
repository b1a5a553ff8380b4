"""Decoding against the bandwidth of memory, and against others: `python -m benchmarks.generation`.

Random weights of the reference dimensions in bfloat16 (`benchmarks.decoding.workload` says what is decoded and what the roof
is). Each section runs in a process of its own with a time limit; its results are JSON lines, to the screen and to `--out`.

    check         our step, eager and captured, against float64
    ours          milliseconds a token for each batch size; one process each
    prompts       milliseconds to read 1, 16 and 64 prompts, of one length and of many
    profile       where a token's time goes, by group of kernels
    compiled      a plain decoder with a static cache, one block compiled, all captured
    transformers  `generate` of transformers, with a static cache, compiled, and with a dynamic one
    sweep         GB/s of each product of a block by how it is cut
    whole         the plain decoder compiled as a whole, as published; takes minutes, so name it to run it

`--quick` runs all of it on tiny dimensions, on any machine.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import sections
from benchmarks.decoding.compiled import time_compiled
from benchmarks.decoding.kernels import profile, sweep
from benchmarks.decoding.library import time_library
from benchmarks.decoding.ours import check, time_ours, time_prompts
from benchmarks.decoding.workload import bandwidth
from benchmarks.measuring import close, result
from benchmarks.training.records import SIZES, records

LIMIT_S = {
    "check": 60, "ours": 75, "prompts": 75, "profile": 60, "compiled": 150, "transformers": 150, "sweep": 60, "whole": 300,
}  # fmt: skip
"""Minutes where much is compiled; 64 rows read their prompts for 10 s."""

SECTIONS: dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]] = {
    "check": check,
    "ours": time_ours,
    "prompts": time_prompts,
    "profile": profile,
    "compiled": time_compiled,
    "transformers": time_library,
    "sweep": sweep,
    "whole": time_compiled,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sections", default="check,ours,prompts,profile,compiled,transformers,sweep")
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--ways", default="eager,fast,programmatic", help="of ours")
    parser.add_argument("--out", type=Path, default=Path("generation.jsonl"))
    parser.add_argument("--quick", action="store_true")
    sections.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.batches, arguments.prompt, arguments.tokens = "quick", "1,2", 32, 8
    torch.set_grad_enabled(False)
    if arguments.run:
        torch.manual_seed(0)
        if arguments.run not in ("check", "sweep"):
            bandwidth(arguments)
        SECTIONS[arguments.run](arguments, json.loads(arguments.option))
        return
    arguments.out.unlink(missing_ok=True)
    for section in arguments.sections.split(","):
        for option in options(section, arguments):
            start(section, arguments, option)
    summary(arguments.out)


def options(section: str, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What a section is run for, each in a process of its own."""
    if section == "ours":
        return [{"rows": int(rows)} for rows in arguments.batches.split(",")]
    if section == "prompts":
        return [{"rows": rows} for rows in ((1, 3) if arguments.quick else (1, 16, 64))]
    if section == "transformers":
        return [{"cache": "static"}, {"cache": "dynamic"}]
    return [{"way": {"compiled": "block", "whole": "whole"}[section]}] if section in ("compiled", "whole") else [{}]


def start(section: str, arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    passed = ("size", "prompt", "tokens", "ways", "out", "quick")
    sections.start("benchmarks.generation", section, arguments, option, passed, LIMIT_S[section])


def summary(out: Path) -> None:
    """The table that is read first, and one token a step against each of the others."""
    print("\n== summary")
    for r in records(out):
        if "tokens_per_s" in r:
            print(
                f"{r['section']:<14}{r['what']:<18}{r['rows']:>3} rows {r['ms']:>9.3f} ms {r['tokens_per_s']:>9,} tokens/s "
                f"{r['share_of_roof']:>6.1%} of the roof  {r.get('first_token_ms', '')}"
            )
        elif r.get("error"):
            print(f"{r['section']:<14}{r['what']:<18}ERROR {r['error'][-300:]}")
        elif r["what"] in ("token", "equal", "ragged") or r.get("skipped"):
            print(json.dumps(r))
    timed = [r for r in records(out) if "tokens_per_s" in r and r["rows"] == 1]
    ours = max((r["tokens_per_s"] for r in timed if r["section"] == "ours"), default=None)
    checked = "the section's records `agreement`: logits or likeliest tokens with the same weights"
    peers = [r for r in timed if r["section"] != "ours"]
    if ours and peers:
        names = {f"{r['section']}, {r['what']}": r["tokens_per_s"] for r in peers}
        close(
            [
                result(f"decoding one row, against {name}", ours, theirs, "tokens/s", checked=checked)
                for name, theirs in names.items()
            ]
        )


if __name__ == "__main__":
    main()
