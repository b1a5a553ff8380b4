"""What a model must beat: the cross-entropy of token frequencies alone.

Enters: how often each token occurs in the training split and among the validation targets. Leaves: a `CrossEntropy`.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pipelines.pretrain.validate import CrossEntropy, TokenCounts
from pipelines.sequence import Vocabulary
from pipelines.shards.statistics import Statistics


def unigram_cross_entropy(whole: Statistics, held_out: TokenCounts, vocabulary: Vocabulary) -> CrossEntropy:
    """Cross-entropy of add-one smoothed unigrams, one for each modality and audio codebook, on held-out targets.

    Args:
        whole: the statistics of the version.
        held_out: what is evaluated.
    """
    sums, counts = [], []
    for log_p, evaluated in zip(unigram(whole, held_out, vocabulary), held_out.groups(), strict=True):
        sums.append(float(-(evaluated * log_p).sum()))
        counts.append(int(evaluated.sum()))
    return CrossEntropy.of(np.array(sums), np.array(counts))


def unigram(whole: Statistics, held_out: TokenCounts, vocabulary: Vocabulary) -> list[NDArray[np.float64]]:
    """Log probability of each token in nats, in the order of `TokenCounts.groups`, by add-one smoothed frequencies.

    They are fitted on all of a dataset version but the held-out targets. That is the training split; where only part of
    the validation split is evaluated, also the rest of it, which makes the baseline a little harder to beat.
    """
    text = whole.text_counts.copy()
    # A document's opening token is predicted by nobody.
    text[vocabulary.document] = 0
    # A view has the first codebooks alone.
    audio = whole.audio_counts[: vocabulary.audio_codebooks]
    fitted = TokenCounts(text - held_out.text, whole.image_counts - held_out.image, audio - held_out.audio)
    return [
        np.log(train + 1.0) - np.log((train + 1.0).sum()) if len(train) else train.astype(np.float64)
        for train in fitted.groups()
    ]
