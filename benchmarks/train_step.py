"""The training step on the fixed workload: `python -m benchmarks.train_step`.

The reference configuration (7.60 B) on one GPU: packed documents (`packed_workload`), 262,144 tokens an optimizer step,
optimizer included. Each section runs in a process of its own with a time limit, so that one that fails takes no other
with it; its results are JSON lines, to the screen and to `--out`.

    check      the fused block, the heads' loss, attention and the optimizer against float64
    attention  milliseconds of each attention backend on the workload's documents
    matmul     TFLOP/s of each matrix product of a block
    tune       each of these products by every kernel that cuBLASLt names (when named)
    step       tokens/s of whole optimizer steps, with a breakdown by kind of kernel
    variants   the same for other settings, from fewer micro-batches
    losses     loss curves of float32 and of leaner masters, gradients, moments and products, side by side
    peers      transformers' GPT-NeoX, litgpt and torchtitan at the same dimensions (benchmarks/training/peers.py)

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
from benchmarks.measuring import close, result
from benchmarks.training.check import check
from benchmarks.training.kernels import time_attention, time_products
from benchmarks.training.losses import compare_losses
from benchmarks.training.peers import PEERS, time_peer
from benchmarks.training.records import SIZES, records
from benchmarks.training.steps import time_steps
from benchmarks.training.tune import tune_products
from benchmarks.training.variants import VARIANTS, time_variant
from model.attention import BACKENDS

LIMIT_S = {
    "check": 150,
    "attention": 100,
    "matmul": 50,
    "tune": 150,
    "step": 210,
    "variants": 120,
    "losses": 120,
    "peers": 150,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sections", default="check,attention,step,matmul,variants,losses,peers")
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--steps", type=int, default=3, help="timed optimizer steps of the section step")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--micro", default="4,3,2,1", help="rows of a micro-batch to try, until one fits")
    parser.add_argument(
        "--keep", default="least", choices=("least", "all"), help="what blocks keep, in the section step"
    )
    parser.add_argument(
        "--tune", action="store_true", help="take the fastest kernel of each product, in the section step"
    )
    parser.add_argument("--precision", default="bf16", choices=("bf16", "float8"), help="of the section step")
    parser.add_argument("--backends", default=",".join(BACKENDS), help="of the sections check and attention")
    parser.add_argument("--variants", help="parts of the names of those to run, separated by commas; default all")
    parser.add_argument(
        "--attention", help="backend; the fastest that passed the sections check and attention by default"
    )
    parser.add_argument("--out", type=Path, default=Path("train_step.jsonl"))
    parser.add_argument("--quick", action="store_true")
    sections.add_arguments(parser)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.length, arguments.steps, arguments.micro = "quick", 256, 2, "2"
    if arguments.run:
        run_section(arguments)
        return
    arguments.out.unlink(missing_ok=True)
    for section in arguments.sections.split(","):
        if section in ("check", "attention"):
            for backend in arguments.backends.split(","):
                start(section, arguments, {"backend": backend})
        elif section == "variants":
            wanted = (arguments.variants or "").split(",")
            for option in VARIANTS:
                if any(part in option["name"] for part in wanted):
                    start(section, arguments, option)
        elif section == "peers":
            for peer in PEERS:
                start(section, arguments, {"peer": peer})
        else:
            start(section, arguments, {})
    summary(arguments.out)


def start(section: str, arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Run a section in a process of its own; whatever happens to it is a record."""
    passed = ("size", "steps", "length", "micro", "keep", "precision", "tune", "out", "quick", "attention")
    sections.start("benchmarks.train_step", section, arguments, option, passed, LIMIT_S[section])


def run_section(arguments: argparse.Namespace) -> None:
    """What the process of one section does."""
    torch.manual_seed(0)
    if torch.cuda.is_available():
        torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = True
    named: dict[str, Callable[[argparse.Namespace, dict[str, Any]], None]] = {
        "check": check,
        "attention": time_attention,
        "matmul": time_products,
        "tune": tune_products,
        "step": time_steps,
        "variants": time_variant,
        "losses": compare_losses,
        "peers": time_peer,
    }
    named[arguments.run](arguments, json.loads(arguments.option))


def summary(out: Path) -> None:
    """The table that is read first."""
    print("\n== summary")
    for r in records(out):
        if "tokens_per_s" in r:
            mfu, peak = r.get("mfu_full", ""), r.get("peak_gib")
            print(f"{r['section']:<10}{r['what']:<44}{r['tokens_per_s']:>9,} tokens/s  {mfu}  {peak}")
        elif r["what"] == "breakdown":
            print(json.dumps(r))
        elif r.get("error"):
            print(f"{r['section']:<10}{r['what']:<44}ERROR {r['error'][:200]}")
    timed = [r for r in records(out) if "tokens_per_s" in r]
    ours = [r["tokens_per_s"] for r in timed if r["section"] == "step"]
    checked = "gradients against float64 in the section check; the peer has one head, and no packed documents"
    peers = [r for r in timed if r["section"] == "peers"]
    if ours and peers:
        close(
            [
                result(f"training step, against {r['what']}", ours[-1], r["tokens_per_s"], "tokens/s", checked=checked)
                for r in peers
            ]
        )


if __name__ == "__main__":
    main()
