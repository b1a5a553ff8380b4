"""The learning rate at each step."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import ScheduleSettings


def learning_rate_factor(settings: ScheduleSettings, step: int, total_steps: int) -> float:
    """Share of the peak learning rate at a step, counted from 0.

    Warmup is linear and reaches the peak with its last step. Then a cosine to the minimum (Loshchilov and Hutter, SGDR,
    2017), a line to it, or a plateau and a linear decay to it (warmup-stable-decay; Hu et al., MiniCPM, 2024). The
    minimum is reached with the last step.
    """
    warmup = settings.warmup(total_steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step + 1 - warmup) / (total_steps - warmup))
    if settings.kind == "cosine":
        shape = 0.5 * (1 + math.cos(math.pi * done))
    elif settings.kind == "linear":
        shape = 1 - done
    else:
        shape = min(1.0, max(0.0, (total_steps - step - 1) / settings.decay(total_steps)))
    return settings.minimum + (1 - settings.minimum) * shape
