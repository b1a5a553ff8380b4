"""What a whole pretraining run loses to data and to saving: `python -m benchmarks.real_run [--sizes 8b,1b]`.

`braid pretrain`, as users start it, on the shipped recipe of a size and a dataset of random documents with the shape of the
fixed workload (`shaped_documents`). What its metrics tell: tokens/s, the share of a step in which it waited for data, the
pause of each save; besides, watched from outside, how long it took until a checkpoint was whole. The run is ended (SIGKILL)
when it has taken its steps and its checkpoints are whole, for its last checkpoint and its export are no part of the question.

    --sizes 8b,1b    `8b` does not save: its state is 61 GB, on the host and on the disk. --save 8b has it save, too
    --ranks 2        a run on 2 GPUs with FSDP saves, and goes on from there on 1: losses beside those of the first run
    --bare           besides, the bare step of the same recipe (`multi_gpu_rank`): no loader, no metrics, no saving

A step has 16 sequences and logs by itself, so that the host waits for the device at each: what is told of data is the worst
that a run sees. Windows are 500,000 tokens, where the recipe has 16 M, so that many begin in few steps. Results go to the
screen and as JSON lines to `--out`.

Needs torch, numpy, pyarrow, pyyaml, rich, typer, tensorboard, deltalake and pydantic with what they need; takes flash-attn-4
where it is there.

`--quick` runs all of it on tiny dimensions with gloo, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.measuring import close, hardware, result
from benchmarks.shaped_documents import shaped_dataset
from benchmarks.watched_run import ENVIRONMENT, Watched

TINY = (
    "model.hidden_size=64", "model.num_layers=2", "model.num_attention_heads=2", "model.ffn_hidden_size=128",
    "threads=1", "device=cpu",
)  # fmt: skip
STEPS = {"8b": 12, "1b": 48, "tiny": 12}
SAVES = {"8b": 0, "1b": 2, "tiny": 2}
WARM = 3
"""Steps that compile kernels and find memory, of which speed is not told."""
CHECKED = "documents of the same lengths and shares of modalities; the same model, optimizer and step"
TOLERANCE = 2e-3
"""Of losses in bfloat16 on another number of ranks, relative."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--sizes", default="8b,1b")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--save", default="", help="sizes that save although they do not by default, by commas")
    parser.add_argument("--steps", type=int, help="of a run on one GPU; the default depends on the size")
    parser.add_argument("--rows", default="4,2,1", help="of a micro-batch, to try until one fits")
    parser.add_argument("--sequences", type=int, default=16, help="of a step, on all ranks together")
    parser.add_argument("--tokens", type=int, default=8_000_000, help="of the dataset")
    parser.add_argument("--set", action="append", default=[], help="a.b=value of the recipe")
    parser.add_argument("--folder", type=Path, help="for datasets and runs; a temporary one by default")
    parser.add_argument("--compare", type=int, default=8, help="steps after the checkpoint whose losses are compared")
    parser.add_argument("--limit", type=float, default=150, help="seconds of a run")
    parser.add_argument("--bare", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("real_run.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.sizes, arguments.rows, arguments.sequences, arguments.tokens = "tiny", "2", 4, 60_000
        arguments.compare = 4
    arguments.out.unlink(missing_ok=True)
    closing: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        length = 256 if arguments.quick else 4096
        shaped_dataset(Path(folder) / "tokens", arguments.tokens, longest=length)
        for size in arguments.sizes.split(","):
            measure = across if arguments.ranks > 1 else alone
            record: dict[str, Any] = {"size": size, "ranks": arguments.ranks}
            try:
                record |= measure(size, Path(folder), arguments)
            except RuntimeError as error:
                record["error"] = str(error)
            print(json.dumps(record), flush=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps(record) + "\n")
            if "bare_tokens_per_s" in record:
                closing.append(record)
    # Not before: asking which GPU it is takes memory of it, of which `8b` leaves little.
    print(hardware())
    if closing:
        close(
            [
                result(
                    f"{r['size']}: a whole run, against the bare step", r["tokens_per_s"], r["bare_tokens_per_s"], "tokens/s",
                    checked=CHECKED,
                )
                for r in closing
            ]
        )  # fmt: skip


def recipe_of(size: str, rows: int, folder: Path, arguments: argparse.Namespace, *, every: int) -> list[str]:
    """The recipe and what is set in it. A run that is not to save would have to be very long to."""
    length = 256 if arguments.quick else 4096
    return [
        f"pretrain/{'1b' if arguments.quick else size}", f"output={folder / size}", f"data.dataset={folder / 'tokens'}",
        f"data.sequence_length={length}", f"data.window_tokens={20_000 if arguments.quick else 500_000}", "tokens=null",
        "steps=1000000", f"batch.sequences={arguments.sequences}", f"batch.micro_batch={rows}", "logging.every=1",
        f"checkpoints.every={every or 1_000_000}", "checkpoints.keep=2", "schedule.warmup_steps=1",
        f"checkpoints.asynchronous={'true' if every else 'false'}", "faults.hang_s=300",
        *(TINY if arguments.quick else ()), *arguments.set,
    ]  # fmt: skip


def fitting(size: str, folder: Path, arguments: argparse.Namespace, *, every: int, steps: int, saves: int) -> Watched:
    """A run with the largest micro-batch that fits."""
    rows = [int(number) for number in arguments.rows.split(",")]
    for number in rows:
        run = Watched(recipe_of(size, number, folder, arguments, every=every), folder / size, arguments.ranks, number)
        try:
            run.watch(steps=steps, saves=saves, limit_s=arguments.limit)
            return run
        except RuntimeError as error:
            said = str(error).lower()
            if len(run.steps) > WARM:
                # What it has told is worth having.
                run.fault = str(error)
                return run
            if ("out of memory" not in said and "outofmemory" not in said) or number == rows[-1]:
                raise
            print(f"{size}: micro-batches of {number} rows do not fit", flush=True)
    raise AssertionError("at least one size of a micro-batch is named")


def alone(size: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run on one GPU: what it loses to data and to saving."""
    steps = arguments.steps or STEPS[size]
    saves = SAVES[size] or (1 if size in arguments.save.split(",") else 0)
    run = fitting(size, folder, arguments, every=steps // saves if saves else 0, steps=steps, saves=saves)
    found = figures(run)
    shutil.rmtree(run.folder)
    if arguments.bare:
        found |= bare(folder, run, arguments)
    return found


def across(size: str, folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """A run on several GPUs that saves, gone on with on fewer: losses beside those of the first."""
    # Two of its lengths, so that no other checkpoint is due before all steps that are compared.
    every, steps = 2 * arguments.compare, 3 * arguments.compare
    run = fitting(size, folder, arguments, every=every, steps=steps, saves=1)
    found = figures(run)
    if run.fault:
        return found
    expected = run.losses(after=every, until=steps)
    resumed = []
    ranks = arguments.ranks // 2
    while ranks:
        again = Watched(run.recipe, run.folder, ranks, run.rows)
        again.watch(steps=steps, saves=0, limit_s=arguments.limit, goes_on_from=every)
        ours = again.losses(after=every, until=steps)
        worst = max(abs(ours[step][m] - value) / value for step, loss in expected.items() for m, value in loss.items())
        resumed.append(
            {
                "saved_on": arguments.ranks,
                "ranks": ranks,
                "steps": len(ours),
                "largest_relative_difference": float(f"{worst:.2e}"),
                "agrees": worst < TOLERANCE,
                "losses": [list(loss.values()) for loss in ours.values()],
                "of_the_first": [list(loss.values()) for loss in expected.values()],
            }
        )
        ranks //= 2
    return found | {"resumed": resumed}


def figures(run: Watched) -> dict[str, Any]:
    """What the metrics of a run say, and the clock."""
    steps = [record for record in run.steps if record["step"] > WARM]
    shares = [record["data_wait_share"] for record in steps]
    return {
        "micro_batch": run.rows,
        "tokens_per_s": round(statistics.median(r["tokens_per_s"] for r in steps)),
        "mfu_full": round(statistics.median(r["mfu"]["full"] for r in steps), 4) if "mfu" in steps[0] else None,
        "tokens_per_s_while_writing": run.speed_while_writing(WARM),
        "steps": len(steps),
        "data_wait_share": {
            "median": float(f"{statistics.median(shares):.2e}"),
            "worst": float(f"{max(shares):.2e}"),
            "of_all_steps": float(f"{run.data_wait(WARM):.2e}"),
            "first_step": float(f"{run.steps[0]['data_wait_share']:.2e}"),
        },
        "memory_gb": round(max(record["memory_gb"] for record in steps), 1),
        "first_step_after_s": round(run.first_step_s, 1),
        "page_locking": run.said("page-locked") or run.said("NO PAGE-LOCKED"),
        "saves": [
            {
                "step": save["step"],
                "pause_s": round(save["pause_s"], 3),
                "of_it_waiting_for_the_one_before_s": round(save["waited_s"], 3),
                "whole_after_s": round(whole, 1)
                if (whole := run.whole_after_s.get(save["step"])) is not None
                else None,
                "gb": round(run.bytes_of.get(save["step"], 0) / 1e9, 2),
            }
            for save in run.saves
        ],
    } | ({"error": run.fault} if run.fault else {})


def bare(folder: Path, run: Watched, arguments: argparse.Namespace) -> dict[str, Any]:
    """tokens/s of the step of the same recipe on the fixed workload, nothing around it."""
    out = folder / "bare.jsonl"
    out.unlink(missing_ok=True)
    recipe, *overrides = run.recipe
    command = [
        sys.executable, "-m", "benchmarks.multi_gpu_rank", "--recipe", recipe, "--micro-batches",
        str(arguments.sequences // run.rows), "--out", str(out),
        *(word for override in overrides for word in ("--override", override)),
    ]  # fmt: skip
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        return {"bare_error": done.stderr[-800:]}
    return {"bare_tokens_per_s": json.loads(out.read_text())["tokens_per_s_gpu"]}


if __name__ == "__main__":
    main()
