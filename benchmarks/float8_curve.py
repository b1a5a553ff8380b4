"""The loss curve of float8 beside bf16's, over 1,000 steps on real tokens: `python -m benchmarks.float8_curve --tokens FILE`.

The same model, documents, order and initial weights (`benchmarks.ablation`, whose file of documents this takes); a second run
in bf16 with another order says how much two curves differ anyway. `--plot RESULTS --to SVG` draws them.

`--quick` trains some steps of a tiny model, on any machine.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

from benchmarks import ablation
from benchmarks.ablation import RATE, SIZE, TINY, train
from benchmarks.measuring import hardware
from benchmarks.real_documents import read_documents
from benchmarks.training.records import record, records
from model import MODALITIES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--out", type=Path, default=Path("float8_curve.jsonl"))
    parser.add_argument("--plot", type=Path, help="results to draw, and stop")
    parser.add_argument("--to", type=Path, default=Path("docs/float8.svg"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.plot:
        ablation.plot(records(arguments.plot), arguments.to)
        return
    if not arguments.tokens:
        parser.error("give --tokens or --plot")
    if arguments.quick:
        arguments.steps, arguments.length, arguments.rows = 4, 256, 4
    documents = read_documents(arguments.tokens)
    arguments.out.unlink(missing_ok=True)
    steps = documents.steps(
        arguments.steps, sequences=arguments.rows, micro_batch=arguments.rows, length=arguments.length
    )
    held_out = documents.steps(8, sequences=4, micro_batch=4, length=arguments.length, held_out=True)
    choice = {"qk_norm": False, "z_loss": 0.0, "weights": "equal", "rate": RATE}
    curves = {}
    for name, precision, order in (
        ("bf16", "bf16", steps), ("float8", "float8", steps), ("bf16, another order", "bf16", steps[::-1]),
    ):  # fmt: skip
        began = time.monotonic()
        found = train(
            documents, order, held_out, choice, size=TINY if arguments.quick else SIZE, length=arguments.length,
            precision=precision,
        )  # fmt: skip
        record(arguments.out, "float8", name, seconds=round(time.monotonic() - began, 1), hardware=hardware(), **found)
        curves[name] = found
    for name, found in curves.items():
        tail = {m: statistics.mean(found["curve"][m][-max(1, arguments.steps // 10) :]) for m in MODALITIES}
        held = ", ".join(f"{m} {found['held_out'][m]:.4f}" for m in MODALITIES)
        print(f"{name:<22} last tenth {', '.join(f'{m} {x:.4f}' for m, x in tail.items())}; held out {held}")


if __name__ == "__main__":
    main()
