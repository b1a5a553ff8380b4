"""A checkpoint measured on a dataset, from beginning to end.

Enters: a `Generator` (model, vocabulary and tokenizers that agree) and a dataset. Leaves: an `Evaluation`. Always holds:
the losses are those that validation reports for the same documents; equal seed, settings and machine give equal figures.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipelines.evaluate.documents import Split
from pipelines.evaluate.errors import EvaluateError
from pipelines.evaluate.figures import by_position, modality_figures, reliability
from pipelines.evaluate.gain import measure_gain
from pipelines.evaluate.generation import Shown, measure_generation
from pipelines.evaluate.pairs import Pairs
from pipelines.evaluate.scoring import Scorer
from pipelines.evaluate.tally import Tally
from pipelines.generate import Generator, Sampling
from pipelines.generate.decoding import Watcher
from pipelines.pretrain.baseline import unigram
from pipelines.pretrain.validate import CrossEntropy
from pipelines.sequence import Modality

SCHEMA = "braid.evaluate/1"
"""Raised with every change that a reader of the JSON would notice; new keys may come without it."""

SAMPLES = 12
"""Pairs of each direction that are generated."""

FEW_PAIRS = 20
"""Below it, a bootstrap says little."""

Watch = Callable[[str], AbstractContextManager[Watcher | None]]
"""Opens a watcher for a part of the work, such as `pipelines.generate.ProgressBar`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Evaluation:
    """What an evaluation came to."""

    figures: dict[str, Any]
    """JSON values, as docs/evaluate.schema.json describes them."""
    cross_entropy: CrossEntropy
    """As validation reports it."""
    shown: list[Shown]
    """What was generated; empty without generation."""


def unwatched(label: str) -> AbstractContextManager[Watcher | None]:
    """No watcher."""
    return nullcontext()


def evaluate(
    checkpoint: str | Path | Generator,
    dataset: str,
    *,
    version: int | None = None,
    split: str = "validation",
    limit: int | None = None,
    generate: bool = True,
    samples: int = SAMPLES,
    sampling: Sampling = Sampling(),  # noqa: B008
    seed: int = 0,
    device: str | None = None,
    watch: Watch = unwatched,
) -> Evaluation:
    """Measure a checkpoint.

    Args:
        checkpoint: a run's folder, the model's folder in it, or what `Generator.load` made of one. Of its files, only
            safetensors and JSON are read.
        version: of the dataset; the newest by default.
        split: validation, or train.
        limit: so many documents of it, drawn by the seed.
        generate: let it draw, speak and write, too.
        samples: pairs of each direction that it is asked for.
        sampling: of pictures and sounds.
        seed: of what is drawn: documents of a limit, pairs, resamples, tokens.
        device: default the GPU if there is one; computes in bfloat16 there, and in float32 elsewhere.

    Raises:
        EvaluateError: nothing to evaluate, or the model computes what is no number.
        VocabularyError: the dataset or a tokenizer is not of the checkpoint's vocabulary; it lists what differs.
        CheckpointError: no exported model there, or a damaged one.
        DatasetError: no dataset there.
        GenerateError: the device is not here.
    """
    if samples < 2:
        raise EvaluateError(f"samples is {samples}: give at least 2, or turn generation off")
    generator = checkpoint if isinstance(checkpoint, Generator) else Generator.load(checkpoint, device=device)
    vocabulary, model, audio = generator.vocabulary, generator.model, generator.tokenizers.audio
    context = model.config.max_sequence_length
    documents = Split.open(
        dataset,
        vocabulary,
        context=context,
        whose=generator.name,
        version=version,
        split=split,
        limit=limit,
        seed=seed,
    )
    statistics = documents.dataset.statistics()
    scorer = Scorer(model, vocabulary.end, name=generator.name)
    tally = Tally(
        vocabulary, statistics, generator.tokenizers.text.decode, audio.frame_rate_hz if audio else float("nan")
    )
    pairs = Pairs(vocabulary, context, seed)
    with watch("scoring") as watcher:
        if watcher is not None:
            watcher.started(documents.tokens)
        for document, scores in scorer.documents(documents, watcher):
            tally.add(document, scores)
            pairs.add(document)
    log_p = unigram(statistics, tally.token_counts, vocabulary)
    with watch("cross-modal gain") as watcher:
        gain = measure_gain(pairs, scorer, vocabulary, log_p, context=context, seed=seed, watcher=watcher)
    generation: list[dict[str, Any]] | None = None
    shown: list[Shown] = []
    if generate:
        with watch("generating") as watcher:
            generation, shown = measure_generation(
                pairs, generator, documents.dataset, samples=samples, sampling=sampling, seed=seed, watcher=watcher
            )
    figures = {
        "schema": SCHEMA,
        "checkpoint": _checkpoint(generator),
        "dataset": {"uri": documents.dataset.uri, "version": documents.dataset.version},
        "split": split,
        "limit": limit,
        "seed": seed,
        "documents": documents.documents,
        "tokens": documents.tokens,
        "modalities": modality_figures(tally, log_p, seed),
        "reliability": reliability(tally),
        "positions": by_position(tally, log_p),
        "gain": gain,
        "generation": generation,
        "sampling": asdict(sampling) if generate else None,
        "remarks": _remarks(documents, tally, gain, generation),
    }
    return Evaluation(figures=figures, cross_entropy=tally.cross_entropy, shown=shown)


def _checkpoint(generator: Generator) -> dict[str, Any]:
    weight = generator.model.modality_embedding.weight
    return {
        "path": generator.name,
        "step": _count(generator.about.get("step")),
        "tokens": _count(generator.about.get("tokens")),
        "parameters": generator.model.config.num_parameters(),
        "context": generator.model.config.max_sequence_length,
        "fingerprint": generator.vocabulary.fingerprint,
        "device": weight.device.type,
        "precision": str(weight.dtype).removeprefix("torch."),
    }


def _count(told: Any) -> int | None:
    """A number that a checkpoint tells of itself, if it is one."""
    return told if isinstance(told, int) and not isinstance(told, bool) else None


def _remarks(
    documents: Split, tally: Tally, gain: list[dict[str, Any]], generation: list[dict[str, Any]] | None
) -> list[str]:
    """What a reader should know before comparing figures."""
    remarks = []
    counts = dict(zip(Modality, (tally.counts[0], tally.counts[1], tally.counts[2:].sum()), strict=True))
    for modality, count in counts.items():
        if not tally.vocabulary.size(modality):
            remarks.append(f"{modality.label}: the checkpoint was trained without it")
        elif not count:
            remarks.append(f"{modality.label}: no document here has any, so it is not measured")
    if documents.name == "train":
        remarks.append(
            "the checkpoint may have been trained on these documents: it says nothing of how well it generalizes"
        )
    if not gain:
        remarks.append("no two documents hold two modalities each that fit the context: no cross-modal gain")
    few = [f"{e['given']} to {e['predicted']} ({e['documents']})" for e in gain if e["documents"] < FEW_PAIRS]
    if few:
        remarks.append(f"fewer than {FEW_PAIRS} pairs, so the intervals are rough: {', '.join(few)}")
    for entry in generation or []:
        if entry["originals_missing"]:
            remarks.append(
                f"{entry['given']} to {entry['predicted']}: not every original was found ({entry['originals_missing']})"
            )
    return remarks
