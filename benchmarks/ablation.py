"""What keeps training of three modalities stable: norms of queries and keys x z-loss x loss weights, on real tokens.

    python -m benchmarks.ablation --write tokens.npz [--dataset demo/benchmarks/real_tokens]   # where a dataset can be read
    python -m benchmarks.ablation --tokens tokens.npz --out ablation.jsonl                     # on the GPU: under 8 minutes
    python -m benchmarks.ablation --plot ablation.jsonl --to docs/ablation.svg                 # where matplotlib is

A model of 25 M parameters in its blocks; each run has the same documents in the same order, and the same initial weights.
The runs with four times the learning rate show what breaks first. Model, optimizer and step are those of a pretraining
run. Held-out loss by modality is what counts, since loss weights change the loss that is trained on. Without `--dataset`,
`--write` tokenizes the documents of `benchmarks.token_corpus`. The GPU machine needs torch and numpy alone.

`--quick` trains some steps of a tiny model, on any machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.measuring import hardware
from benchmarks.packed_workload import Step
from benchmarks.real_documents import Documents, read_documents, write_documents
from benchmarks.training.records import device, record, records, synchronize
from benchmarks.training.trainer import trainer
from model import MODALITIES, UnifiedTransformerConfig

SIZE = {"hidden_size": 512, "num_layers": 8, "num_attention_heads": 4, "ffn_hidden_size": 2048}
TINY = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "ffn_hidden_size": 64}
RATE = 1e-3
WEIGHTS: dict[str, dict[str, float]] = {
    "equal": {},
    "media halved": {"image": 0.5, "audio": 0.5},
    "as many of each": {},
}
"""What a target counts; "as many of each" is set from the tokens: the inverse of a modality's share, text 1."""


def choices() -> list[dict[str, Any]]:
    """The runs, those that matter most first, so that a limit of time cuts the least."""
    grid = [
        {"qk_norm": qk, "z_loss": z, "weights": weights, "rate": RATE}
        for weights, qk, z in itertools.product(WEIGHTS, (False, True), (0.0, 1e-4))
    ]
    hot = [
        {"qk_norm": qk, "z_loss": z, "weights": "equal", "rate": 4 * RATE} for qk in (False, True) for z in (0.0, 1e-4)
    ]
    return [*grid[:4], *hot, *grid[4:]]


def name_of(choice: dict[str, Any]) -> str:
    parts = ["QK-norm" if choice["qk_norm"] else "no QK-norm", f"z-loss {choice['z_loss']:g}", choice["weights"]]
    return ", ".join(parts) + (f", rate {choice['rate']:g}" if choice["rate"] != RATE else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", type=Path, help="make the file of documents, and stop")
    parser.add_argument("--dataset", help="with --write: a token dataset")
    parser.add_argument("--text-share", type=float, default=0.4, help="with --write: tokens of documents without media")
    parser.add_argument("--tokens", type=Path)
    parser.add_argument("--out", type=Path, default=Path("ablation.jsonl"))
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--rows", type=int, default=8, help="of a step")
    parser.add_argument("--minutes", type=float, default=7.5, help="no run is begun that would not be done by then")
    parser.add_argument(
        "--part", default="1/1", help="2/3 is every third run, from the second on: processes side by side"
    )
    parser.add_argument("--plot", type=Path, help="results to draw, and stop; of several parts, joined")
    parser.add_argument("--to", type=Path, default=Path("docs/ablation.svg"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.write:
        documents = write_documents(arguments.dataset or _real_tokens(), arguments.write, arguments.text_share)
        megabytes = arguments.write.stat().st_size / 1e6
        print(
            f"{arguments.write}: {documents.tokens:,} tokens of {len(documents.ends):,} documents, {megabytes:.1f} MB"
        )
    elif arguments.plot:
        plot(records(arguments.plot), arguments.to)
    elif arguments.tokens:
        if arguments.quick:
            arguments.steps, arguments.length, arguments.rows = 4, min(arguments.length, 256), 4
        run_all(read_documents(arguments.tokens), arguments)
    else:
        parser.error("give --tokens, --write or --plot")


def _real_tokens() -> str:
    from benchmarks.token_corpus import real_tokens

    return str(real_tokens(Path("demo/benchmarks")).uri)


def run_all(documents: Documents, arguments: argparse.Namespace) -> None:
    began = time.monotonic()
    arguments.out.unlink(missing_ok=True)
    steps = documents.steps(
        arguments.steps, sequences=arguments.rows, micro_batch=arguments.rows, length=arguments.length
    )
    held_out = documents.steps(8, sequences=4, micro_batch=4, length=arguments.length, held_out=True)
    shares = torch.stack([_counts(step) for step in steps]).sum(0)
    WEIGHTS["as many of each"] = {
        name: round(float(shares[0] / shares[m]), 3) if shares[m] else 1.0 for m, name in enumerate(MODALITIES)
    }
    record(
        arguments.out, "ablation", "data", hardware=hardware(), documents=len(documents.ends), tokens=documents.tokens,
        tokens_a_run=sum(step.tokens for step in steps), targets=shares.tolist(), weights=WEIGHTS,
        held_out_rows=4 * len(held_out), prepared_s=round(time.monotonic() - began, 1),
    )  # fmt: skip
    longest = 0.0
    part, of = map(int, arguments.part.split("/"))
    for choice in choices()[part - 1 :: of]:
        left = 60 * arguments.minutes - (time.monotonic() - began)
        if left < 1.1 * longest:
            record(
                arguments.out,
                "ablation",
                name_of(choice),
                skipped=f"{left:.0f} s were left, and a run takes {longest:.0f}",
            )
            continue
        start = time.monotonic()
        found = train(
            documents, steps, held_out, choice, size=TINY if arguments.quick else SIZE, length=arguments.length
        )
        longest = max(longest, time.monotonic() - start)
        record(
            arguments.out, "ablation", name_of(choice), **choice, seconds=round(time.monotonic() - start, 1), **found
        )


def _counts(step: Step) -> torch.Tensor:
    return torch.tensor([sum(b.targets[name].count for b in step.micro_batches) for name in MODALITIES])


def train(
    documents: Documents,
    steps: list[Step],
    held_out: list[Step],
    choice: dict[str, Any],
    *,
    size: dict[str, int],
    length: int,
    precision: str = "bf16",
) -> dict[str, Any]:
    """One run: curves by modality, what was reached on held-out documents, how large logits grew."""
    from pipelines.pretrain.by_dataset import Datasets
    from pipelines.pretrain.optimizer import set_learning_rate
    from pipelines.pretrain.schedule import learning_rate_factor
    from pipelines.pretrain.step import clip_gradients, forward_backward
    from pipelines.pretrain.telemetry import attention_peaks

    sizes = {f"{name}_vocab_size": count for name, count in documents.vocab_sizes.items()}
    config = UnifiedTransformerConfig(
        **size, **sizes, qk_norm=choice["qk_norm"], z_loss_weight=choice["z_loss"], max_sequence_length=length,
        loss_chunk_tokens=4096, block_backend="fused",
    )  # fmt: skip
    schedule: Any = SimpleNamespace(kind="cosine", minimum=0.1, warmup=lambda total: total // 10, decay=lambda total: 1)
    datasets = Datasets(["documents"])
    curve: list[Any] = []
    norms: list[Any] = []
    validation: list[dict[str, Any]] = []
    every = max(1, len(steps) // 8)
    with trainer(config, learning_rate=choice["rate"], precision=precision) as run:
        for number, step in enumerate(steps):
            told = forward_backward(
                run.model,
                step,  # type: ignore[arg-type]
                WEIGHTS[choice["weights"]],
                run.ranks,
                datasets,
            )
            norms.append(clip_gradients(run.model, 1.0))
            set_learning_rate(run.optimizer, choice["rate"] * learning_rate_factor(schedule, number, len(steps)))
            run.optimizer.step()
            run.optimizer.zero_grad()
            curve.append(
                torch.stack([told.sums / told.counts.clamp(min=1), (told.squares / told.counts.clamp(min=1)).sqrt()])
            )
            if (number + 1) % every == 0 or number + 1 == len(steps):
                peaks = attention_peaks(run.model, step.micro_batches[0], run.ranks)["attention_logits"]
                validation.append(
                    {"step": number + 1, **evaluate(run, held_out), "attention_logit": round(max(peaks), 3)}
                )
        synchronize()
        found = torch.stack(curve).cpu()
        gradients = torch.stack(norms).float().cpu()
    spikes = (gradients[len(steps) // 10 :] > 5 * gradients.median()).sum()
    return {
        "held_out": validation[-1],
        "validation": validation,
        "curve": {name: [round(x, 4) for x in found[:, 0, m].tolist()] for m, name in enumerate(MODALITIES)},
        "log_partition": {name: round(float(found[-1, 1, m]), 3) for m, name in enumerate(MODALITIES)},
        "gradient_norm": {"median": round(float(gradients.median()), 4), "spikes": int(spikes)},
        "finite": bool(found.isfinite().all()),
    }


@torch.no_grad()
def evaluate(run: SimpleNamespace, held_out: list[Step]) -> dict[str, float]:
    """Nats a token by modality."""
    sums, counts = dict.fromkeys(MODALITIES, 0.0), dict.fromkeys(MODALITIES, 0)
    for step in held_out:
        for batch in step.micro_batches:
            losses = run.model.token_losses(batch.to(device()))
            for name in MODALITIES:
                sums[name] += float(losses[name].double().sum())
                counts[name] += batch.targets[name].count
    return {name: round(sums[name] / max(1, counts[name]), 4) for name in MODALITIES}


def plot(found: list[dict[str, Any]], to: Path) -> None:
    """Curves by modality, a line for each run, and the table of what was reached."""
    import matplotlib as mpl

    mpl.use("svg")
    from matplotlib import pyplot as plt

    # By name, for parts of the runs come in any order.
    runs = sorted((r for r in found if "curve" in r), key=lambda r: r["what"])
    # A colour for each pair of norms and z-loss, a line for each set of weights; a high rate is pale.
    pairs = list(dict.fromkeys((r.get("qk_norm"), r.get("z_loss")) for r in runs))
    figure, axes = plt.subplots(1, len(MODALITIES), figsize=(13, 4.6))
    for axis, name in zip(axes, MODALITIES, strict=True):
        for number, r in enumerate(runs):
            values = r["curve"][name]
            # Means of so many steps: single ones hide the lines behind their noise.
            width = max(1, len(values) // 40)
            means = [statistics.mean(values[i : i + width]) for i in range(0, len(values), width)]
            style = {"equal": "-", "media halved": ":", "as many of each": "--"}.get(r.get("weights", "equal"), "-")
            color = f"C{pairs.index((r.get('qk_norm'), r.get('z_loss'))) if len(pairs) > 1 else number}"
            alpha = 1 if r.get("rate", RATE) == RATE else 0.4
            steps = [i * width for i in range(len(means))]
            axis.plot(steps, means, style, color=color, alpha=alpha, lw=1.2, label=r["what"])
        low = min(min(r["curve"][name]) for r in runs)
        first = max(r["curve"][name][0] for r in runs)
        axis.set(title=name, xlabel="step", ylabel="nats a token", ylim=(low - 0.1, first + 0.1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=3, fontsize=7)
    figure.tight_layout(rect=(0, 0.05 + 0.045 * -(-len(runs) // 3), 1, 1))
    figure.savefig(to, metadata={"Date": None})
    print("| run | text | image | audio | log-partition of text | attention logit | jumps of the gradient |")
    print("|---|---|---|---|---|---|---|")
    for r in runs:
        held = r["held_out"]
        cells = [f"{held[name]:.3f}" for name in MODALITIES]
        more = [
            f"{r['log_partition']['text']:.2f}",
            f"{held['attention_logit']:.1f}",
            str(r["gradient_norm"]["spikes"]),
        ]
        print(f"| {r['what']} | {' | '.join([*cells, *more])} |")
    print(f"\n{to}: {len(runs)} runs")


if __name__ == "__main__":
    main()
