"""Cross-modal gain: how much a caption lowers the loss of its picture, a picture that of its caption, and so on.

Enters: pairs. Leaves: for each direction the loss of the predicted span behind its own partner, behind none, and behind that
of another document. Always holds: the three are of the same tokens, and so are paired; a sequence is `<|document|>`, the
given span, the predicted one, and nothing else.

Of the three, the one without a partner may begin a document as no document of the training did; the shuffled one does not,
and is the fair comparison.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipelines.evaluate.bootstrap import interval
from pipelines.evaluate.figures import Unigram
from pipelines.evaluate.pairs import DIRECTIONS, Direction, Pair, Pairs, shuffled
from pipelines.evaluate.scoring import Scorer
from pipelines.evaluate.tally import groups_of
from pipelines.generate.decoding import Watcher
from pipelines.interleave import EncodedSpan, interleave
from pipelines.interleave import Sequence as TokenSequence
from pipelines.sequence import Vocabulary

_Triple = tuple[TokenSequence, TokenSequence, TokenSequence]
"""Behind its own partner, behind none, behind another's."""


def measure_gain(
    pairs: Pairs, scorer: Scorer, vocabulary: Vocabulary, unigram: Unigram, *, context: int, seed: int,
    watcher: Watcher | None = None,
) -> list[dict[str, Any]]:  # fmt: skip
    """The gain of each direction that has two pairs or more; JSON values."""
    prepared = {direction: _triples(pairs.of(direction), vocabulary, context) for direction in DIRECTIONS}
    prepared = {direction: triples for direction, triples in prepared.items() if len(triples) > 1}
    # Many a sequence comes up in several directions, such as a picture alone.
    distinct = {_key(s): s for triples in prepared.values() for triple in triples for s in triple}
    if watcher is not None:
        watcher.started(sum(len(sequence.token_ids) for sequence in distinct.values()))
    scores = scorer.score([(s, (0, len(s.token_ids))) for s in distinct.values()], watcher)
    losses = {key: score.losses for key, score in zip(distinct, scores, strict=True)}
    found = []
    for direction, triples in prepared.items():
        sums = np.array([[_last_span(s, losses[_key(s)]) for s in triple] for triple in triples])
        found.append(_figures(direction, triples, sums, vocabulary, unigram, seed))
    return found


def _triples(pairs: Sequence[Pair], vocabulary: Vocabulary, context: int) -> list[_Triple]:
    def after(given: EncodedSpan | None, predicted: EncodedSpan) -> TokenSequence:
        return interleave(vocabulary, [predicted] if given is None else [given, predicted])

    return [
        (after(pair.given, pair.predicted), after(None, pair.predicted), after(pairs[other].given, pair.predicted))
        for pair, other in zip(pairs, shuffled(pairs, context), strict=True)
        if other is not None
    ]


def _key(sequence: TokenSequence) -> bytes:
    return sequence.token_ids.tobytes() + sequence.modality_ids.tobytes()


def _last_span(sequence: TokenSequence, losses: NDArray[np.float32]) -> float:
    span = sequence.spans[-1]
    return float(losses[span.start : span.start + span.length].sum(dtype=np.float64))


def _figures(
    direction: Direction,
    triples: Sequence[_Triple],
    sums: NDArray[np.float64],
    vocabulary: Vocabulary,
    unigram: Unigram,
    seed: int,
) -> dict[str, Any]:
    given, predicted = direction
    spans = [(own.token_ids, own.spans[-1]) for own, *_ in triples]
    targets = np.array([span.length for _, span in spans], np.float64)
    log_p = np.concatenate(unigram[groups_of(predicted)])
    baseline = -sum(float(log_p[ids[span.start : span.start + span.length]].sum()) for ids, span in spans)
    own, without, other = sums.T
    total = targets.sum()

    def gain(reference: NDArray[np.float64]) -> dict[str, Any]:
        difference = reference - own
        return {
            "nats": float(difference.sum() / total),
            "interval": interval(difference, targets, seed=seed),
            "documents_helped": float((difference > 0).mean()),
        }

    return {
        "given": given.label,
        "predicted": predicted.label,
        "documents": len(triples),
        "targets": int(total),
        "loss": {
            "own": float(own.sum() / total),
            "without": float(without.sum() / total),
            "shuffled": float(other.sum() / total),
            "unigram": baseline / float(total),
        },
        "gain": {"over_shuffled": gain(other), "over_without": gain(without)},
    }
