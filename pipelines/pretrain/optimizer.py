"""AdamW with the usual groups: matrices decay; norms, biases and embeddings do not.

Over float32 weights it is torch's own, over bfloat16 weights `master_adamw`, which keeps float32 masters.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule

from pipelines.pretrain.master_adamw import MasterAdamW

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import OptimizerSettings


def make_optimizer(model: nn.Module, settings: OptimizerSettings) -> torch.optim.Optimizer:
    """An optimizer over all parameters of a model, sharded or not."""
    embeddings = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    decayed = [p for p in model.parameters() if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in model.parameters() if p.dim() < 2 or id(p) in embeddings]
    groups: list[dict[str, Any]] = [
        {"params": decayed, "weight_decay": settings.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if all(p.dtype == torch.bfloat16 for p in model.parameters()):
        return MasterAdamW(
            groups,
            lr=settings.learning_rate,
            betas=(settings.beta1, settings.beta2),
            eps=settings.epsilon,
            moments=torch.bfloat16 if settings.moments == "bf16" else torch.float32,
            accumulate=not isinstance(model, FSDPModule),
        )
    return torch.optim.AdamW(
        groups,
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        fused=settings.fused,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Use it from the next step on, in all groups."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
