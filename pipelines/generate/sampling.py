"""From logits to one token a row.

The order is fixed: temperature, then top-k, then top-p, then min-p, each over what the one before it left, renormalised;
then one uniform number a row picks from what remains. So the caller owns the randomness, and a row's tokens do not
depend on its neighbours.

Shapes: B batch, V ids that may stand there, C candidates that are left.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from pipelines.generate.errors import GenerateError

LEAST_TEMPERATURE = 1e-6
"""Below it, differences of logits overflow float32; 0 says what is meant."""

FEW = 1024
"""Ids that top-p looks at first on a CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How a token is chosen. The defaults sample from the model's own distribution."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the likeliest token."""
    top_k: int | None = None
    """Keep the k likeliest."""
    top_p: float = 1.0
    """Keep the fewest likeliest whose probabilities reach p (Holtzman et al., 2019)."""
    min_p: float = 0.0
    """Keep those at least p times as likely as the likeliest (Nguyen et al., 2024)."""
    repetition_penalty: float = 1.0
    """Above 1, ids that the document holds already become less likely (Keskar et al., 2019), below 1 more."""
    guidance: float = 1.0
    """Classifier-free guidance (Ho and Salimans, 2022): above 1, what the prompt makes likelier becomes likelier still; 1
    leaves the model's own distribution, 0 forgets the prompt. It needs a model that saw documents without their captions."""

    def __post_init__(self) -> None:
        if not (self.temperature == 0 or LEAST_TEMPERATURE <= self.temperature < math.inf):
            raise GenerateError(
                f"temperature is {self.temperature}: give 0 for the likeliest token, or about 0.5 to 1.2"
            )
        if self.top_k is not None and self.top_k < 1:
            raise GenerateError(f"top_k is {self.top_k}: give at least 1, or leave it out to keep every token")
        if not 0 < self.top_p <= 1:
            raise GenerateError(f"top_p is {self.top_p}: give a share above 0 and at most 1; 1 keeps every token")
        if not 0 <= self.min_p <= 1:
            raise GenerateError(f"min_p is {self.min_p}: give a share from 0 to 1; 0 keeps every token")
        if not 0 < self.repetition_penalty < math.inf:
            raise GenerateError(
                f"repetition_penalty is {self.repetition_penalty}: give about 1.0 to 1.5; 1 leaves repetitions alone"
            )
        if not 0 <= self.guidance < math.inf:
            raise GenerateError(f"guidance is {self.guidance}: give about 1 to 7; 1 turns it off")

    @property
    def greedy(self) -> bool:
        """Whether chance has no part in it."""
        return self.temperature == 0


def penalize(logits: Tensor, held: Tensor, penalty: float) -> Tensor:
    """Make ids that are held already less likely, for a penalty above 1.

    Args:
        logits: floating [B, V].
        held: bool [B, V].
    """
    return torch.where(held, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def sample(logits: Tensor, sampling: Sampling, uniforms: Tensor) -> Tensor:
    """Choose one token a row.

    Args:
        logits: floating [B, V], of the ids that may stand there and no others.
        uniforms: float64 [B] in [0, 1), one draw a row; unread when greedy.

    Returns:
        int64 [B], indices into V.
    """
    if sampling.greedy:
        return logits.argmax(-1)
    probabilities, candidates = distribution(logits, sampling)
    # In float64: a float32 sum over 16,384 codes would shift rare ones by more than their own probability.
    cumulative = probabilities.cumsum(-1, dtype=torch.float64)
    # To the right of equals, so what has probability 0 is never drawn. Where there is no number it would be beyond the last.
    drawn = torch.searchsorted(cumulative, uniforms[:, None] * cumulative[:, -1:], right=True)
    drawn = drawn.clamp(max=cumulative.shape[-1] - 1)
    return (drawn if candidates is None else candidates.gather(-1, drawn))[:, 0]


def distribution(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """What `sample` draws from, for a temperature above 0.

    Returns:
        Weights float32 [B, C], not normalised, 0 for what is cut; and the candidates they belong to, int64 [B, C]
        indices into V, or None where C is V in its own order. Of equals at the border of a cut, which one stays is left to
        the sorting, and the same every time.
    """
    logits = logits.float()
    candidates = None
    if sampling.top_k is not None and sampling.top_k < logits.shape[-1]:
        logits, candidates = logits.topk(sampling.top_k, dim=-1)
    # The largest becomes 0 before the division, so that no temperature makes an infinity.
    weights = torch.softmax((logits - logits.amax(-1, keepdim=True)) / sampling.temperature, -1)
    if sampling.top_p < 1:
        if candidates is None:
            weights, candidates = _likeliest_first(weights, sampling.top_p)
        cumulative = weights.cumsum(-1, dtype=torch.float64)
        weights = torch.where(cumulative - weights < sampling.top_p, weights, 0.0)
    if sampling.min_p > 0:
        weights = torch.where(weights >= sampling.min_p * weights.amax(-1, keepdim=True), weights, 0.0)
    return weights, candidates


def _likeliest_first(probabilities: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """Probabilities [B, C] in descending order and the ids they belong to, at least as many as reach `top_p`."""
    # On the CPU, sorting 32,000 ids takes longer (2.4 ms) than a small model's step; a thousand nearly always do, and
    # looking whether they do is free. A GPU sorts fast, and looking would wait for it.
    if probabilities.device.type == "cpu" and probabilities.shape[-1] > FEW:
        few, candidates = probabilities.topk(FEW, dim=-1)
        if bool((few.cumsum(-1, dtype=torch.float64)[:, -1] >= top_p).all()):
            return few, candidates
    return probabilities.sort(dim=-1, descending=True, stable=True)
