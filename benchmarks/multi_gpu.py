"""FSDP2 and HSDP on the GPUs of one host: `python -m benchmarks.multi_gpu [--ranks 8]`.

The recipes `8b` and `1b` on packed documents (`packed_workload`), lengths 4,096 and 8,192: tokens/s and MFU of a GPU, peak
memory, time in which a GPU only communicates, and speed against one GPU alone, each beside what is predicted
(`pipelines.pretrain.communication`). Rows of a GPU and step are the same on one GPU and on many. Each line is a run of its
own under torchrun, with a time limit; what fails is a line, too. `--settings`, `--recipes` and `--lengths` choose;
`--append` goes on in the same file. NVLink multicast is off. That losses are those of one process, and what happens when
a rank dies: `python -m tests.campaigns.many_ranks`.

Needs torch, numpy, pyyaml and pydantic (with pydantic-core, annotated-types, typing-inspection), and takes flash-attn-4
where it is there.

`--quick` runs all of it on tiny dimensions with gloo, on any machine.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.measuring import close, result

SETTINGS: dict[str, dict[str, Any]] = {
    "fsdp": {},
    "kept after forward": {"sharding.reshard_after_forward": "false"},
    "kept for a step": {"sharding.reshard_after_forward": "false", "sharding.reshard_after_backward": "false"},
    "prefetch 2": {"sharding.prefetch": 2},
    "hsdp": {"sharding.dp_shard": "half"},
    "no accumulation": {"micro_batches": 1},
    "float8": {"precision": "float8"},
    "float8 kept for a step": {
        "precision": "float8",
        "sharding.reshard_after_forward": "false",
        "sharding.reshard_after_backward": "false",
    },
}
"""What is set in the recipe; `micro_batches` is this benchmark's own."""

_BASES = ("bf16", "bf16, no accumulation", "float8")
_TINY = (
    "model.hidden_size=64", "model.num_layers=2", "model.num_attention_heads=2", "model.ffn_hidden_size=128",
    "data.target_sizes=64", "precision=bf16", "masters=optimizer", "optimizer.moments=bf16", "threads=1",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Line:
    """One run."""

    recipe: str
    length: int
    ranks: int
    setting: str

    @property
    def base(self) -> str:
        """Which run of one GPU this one is held against."""
        if "float8" in self.setting:
            return "float8"
        return "bf16, no accumulation" if self.setting in ("no accumulation", _BASES[1]) else "bf16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", help="numbers of GPUs, separated by commas; default 1 and all that are here")
    parser.add_argument("--recipes", default="8b,1b")
    parser.add_argument("--lengths", default="4096,8192")
    parser.add_argument("--settings", default=",".join(SETTINGS), help="parts of names, by commas")
    parser.add_argument("--micro", default="4,2,1", help="rows of a micro-batch at length 4,096 to try, until one fits")
    parser.add_argument("--micro-batches", type=int, default=4, help="of a GPU in a step")
    parser.add_argument("--steps", type=int, default=3, help="timed")
    parser.add_argument("--limit", type=int, default=150, help="seconds of a run")
    parser.add_argument("--out", type=Path, default=Path("multi_gpu.jsonl"))
    parser.add_argument("--append", action="store_true")
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.recipes, arguments.lengths, arguments.micro, arguments.micro_batches = "tiny", "256", "2", 2
        arguments.ranks = arguments.ranks or "1,2,4"
        arguments.steps = 1
    if not arguments.append:
        arguments.out.unlink(missing_ok=True)
    for line in lines(arguments):
        run(line, arguments)
    summary(records(arguments.out))


def lines(arguments: argparse.Namespace) -> Iterator[Line]:
    """What is to be run: for each recipe and length one GPU, and then many under each setting."""
    worlds = [int(n) for n in arguments.ranks.split(",")] if arguments.ranks else [1, _gpus_here()]
    wanted = [part.strip() for part in arguments.settings.split(",")]
    chosen = [name for name in SETTINGS if any(part in name for part in wanted)]
    if arguments.quick:
        # No CPU multiplies in float8.
        chosen = [name for name in chosen if "float8" not in name]
    for recipe in arguments.recipes.split(","):
        for length in map(int, arguments.lengths.split(",")):
            needed = {Line(recipe=recipe, length=length, ranks=1, setting=name).base for name in chosen}
            for ranks in sorted(set(worlds)):
                for name in [base for base in _BASES if base in needed] if ranks == 1 else chosen:
                    if name == "hsdp" and (ranks < 4 or ranks % 2):
                        continue
                    yield Line(recipe=recipe, length=length, ranks=ranks, setting=name)


def run(line: Line, arguments: argparse.Namespace) -> None:
    """Run a line with the largest micro-batch that fits; whatever happens to it is a record."""
    label = {
        "recipe": line.recipe,
        "length": line.length,
        "ranks": line.ranks,
        "setting": line.setting,
        "base": line.base,
    }
    print(f"== {label}", flush=True)
    for rows in arguments.micro.split(","):
        # As many tokens whatever the length.
        micro = max(1, int(rows) * min(4096, line.length) // line.length)
        error, seconds = start(line, micro, arguments, label)
        if error is None:
            print(json.dumps({"took_s": seconds} | _without(records(arguments.out)[-1], "losses")), flush=True)
            return
        with arguments.out.open("a") as file:
            file.write(json.dumps(label | {"micro_batch": micro, "took_s": seconds, "error": error}) + "\n")
        print(f"micro-batch of {micro}: {error[-400:]}", flush=True)
        if "out of memory" not in error.lower() or micro == 1:
            return


def start(line: Line, micro: int, arguments: argparse.Namespace, label: dict[str, Any]) -> tuple[str | None, float]:
    """One run under torchrun; why it failed, if it did, and its seconds."""
    options = settings_of(line)
    micro_batches = int(options.pop("micro_batches", arguments.micro_batches))
    overrides = [
        f"data.sequence_length={line.length}", f"batch.micro_batch={micro}", "tokens=null", "steps=10",
        f"batch.sequences={micro * micro_batches * line.ranks}", "schedule.warmup_steps=1", "faults.hang_s=120",
        *(f"{key}={value}" for key, value in options.items()), *(_TINY if arguments.quick else ()),
    ]  # fmt: skip
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={line.ranks}",
        "-m", "benchmarks.multi_gpu_rank", "--recipe", f"pretrain/{line.recipe}", "--label", json.dumps(label),
        "--micro-batches", str(micro_batches), "--steps", str(arguments.steps), "--out", str(arguments.out.absolute()),
        *(word for override in overrides for word in ("--override", override)),
    ]  # fmt: skip
    environment = os.environ | {
        # Multicast needs what not every host grants, and NCCL then fails at the first collective.
        "NCCL_NVLS_ENABLE": "0",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
        "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    began = time.perf_counter()
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = process.communicate(timeout=arguments.limit)
        error = None if process.returncode == 0 else _why(said)
    except subprocess.TimeoutExpired:
        _, said = end(process)
        error = f"over its limit of {arguments.limit} s; {said[-600:]}"
    return error, round(time.perf_counter() - began, 1)


def end(process: subprocess.Popen[str]) -> tuple[str, str]:
    """End a run with all its ranks; what it has said."""
    # torchrun's ranks are in sessions of their own: killed, it would leave them behind, on their GPUs. Asked, it ends them,
    # by SIGKILL where they take longer than half a minute.
    process.terminate()
    try:
        return process.communicate(timeout=45)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.communicate()


def settings_of(line: Line) -> dict[str, Any]:
    """What a line sets in its recipe."""
    if line.ranks == 1:
        return {"bf16": {}, _BASES[1]: SETTINGS["no accumulation"], "float8": SETTINGS["float8"]}[line.setting].copy()
    options = dict(SETTINGS[line.setting])
    if options.get("sharding.dp_shard") == "half":
        options["sharding.dp_shard"] = line.ranks // 2
    return options


def _why(said: str) -> str:
    """The ranks' own words rather than the launcher's."""
    wanted = [text for text in said.splitlines() if "Error" in text or "error" in text or "out of memory" in text]
    return ("\n".join(wanted[:8]) or said)[:1500]


def _gpus_here() -> int:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count()
    sys.exit("there is no GPU here; --quick runs on CPUs, with gloo")


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []


def _without(record: dict[str, Any], *names: str) -> dict[str, Any]:
    return {key: value for key, value in record.items() if key not in names}


def efficiencies(found: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float | None]]:
    """Each run, and its speed a GPU against that of one GPU with the same recipe, length and precision."""
    alone = {
        (r["recipe"], r["length"], r["base"]): r["tokens_per_s_gpu"]
        for r in found
        if r["ranks"] == 1 and not r.get("error")
    }
    measured = [r for r in found if not r.get("error")]
    keys = [(r["recipe"], r["length"], r["base"]) for r in measured]
    return [
        (r, r["tokens_per_s_gpu"] / alone[key] if key in alone else None) for r, key in zip(measured, keys, strict=True)
    ]


def summary(found: list[dict[str, Any]]) -> None:
    """The table that is read first, and the closing JSON."""
    print("\n== summary: of a GPU")
    print(
        f"{'recipe':<7}{'length':>7}{'GPUs':>6}  {'setting':<26}{'rows':>5}{'tokens/s':>10}{'MFU':>8}{'GiB':>8}", end=""
    )
    print(f"{'NCCL ms':>9}{'exposed':>9}{'of one':>8}{'predicted':>10}")
    best: dict[tuple[str, int, int], tuple[float, dict[str, Any]]] = {}
    for r, efficiency in efficiencies(found):
        told = r["communication"]
        share = f"{efficiency:.1%}" if efficiency else "-"
        numbers = [told.get("communication_ms", "-"), told.get("exposed_ms", "-"), share, r["predicted"]["efficiency"]]
        print(
            f"{r['recipe']:<7}{r['length']:>7}{r['ranks']:>6}  {r['setting']:<26}{r['micro_batch']:>5}"
            f"{r['tokens_per_s_gpu']:>10,.0f}{r['mfu_full']:>8.1%}{r['peak_gib'] or 0:>8.1f}"
            f"{numbers[0]!s:>9}{numbers[1]!s:>9}{numbers[2]:>8}{numbers[3]!s:>10}"
        )
        key = (r["recipe"], r["length"], r["ranks"])
        if r["ranks"] > 1 and efficiency and r["base"] == "bf16" and efficiency > best.get(key, (0.0, r))[0]:
            best[key] = (efficiency, r)
    for r in found:
        if r.get("error"):
            place = f"{r['recipe']:<7}{r['length']:>7}{r['ranks']:>6}  {r['setting']:<26}"
            print(f"{place}{r['micro_batch']:>5}  {r['error'][:150]}")
    checked = "losses of each setting against one process: python -m tests.campaigns.many_ranks"
    closing = [
        result(
            f"{r['recipe']}, length {r['length']}, {r['ranks']} GPUs ({r['setting']}) against one",
            r["tokens_per_s_gpu"], r["tokens_per_s_gpu"] / efficiency, "tokens/s a GPU", checked=checked,
        )
        for efficiency, r in best.values()
    ]  # fmt: skip
    if closing:
        close(closing)


if __name__ == "__main__":
    main()
