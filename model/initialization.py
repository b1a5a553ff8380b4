"""Initial weights: which distribution, and the same numbers on one process and on a thousand.

- Every matrix and embedding: normal, mean 0, standard deviation sqrt(2 / (5 D)) ("small init", Nguyen and Salazar,
  2019; used by GPT-NeoX-20B, 2022). Logits then start with a standard deviation of sqrt(2/5) at any width, so the first
  loss lies about 0.2 above log(vocabulary size). `initializer_std=0.02` gives GPT-2's scheme instead.
- The two matrices of a block that write into the residual stream: divided by sqrt(2 L), because 2 L of them add up
  (Radford et al., GPT-2, 2019, section 2.3).
- LayerNorm scales: 1.

Each parameter draws from a generator of its own, seeded by (seed, its name). So the weights depend neither on the order
of modules nor on sharding: every rank draws the whole parameter and keeps its part, and nothing is communicated. CPU and
GPU generators differ, so equal seeds mean equal weights on one kind of device.
"""

from __future__ import annotations

import hashlib
import math

import torch
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor

from model.config import UnifiedTransformerConfig

# Wrappers of activation checkpointing and torch.compile insert these into parameter names.
_WRAPPER_PREFIXES = ("_checkpoint_wrapped_module.", "_orig_mod.")


@torch.no_grad()
def initialize(model: nn.Module, config: UnifiedTransformerConfig, seed: int) -> None:
    """Fill all parameters of a model in place; those on the meta device are passed over."""
    std = config.initializer_std or math.sqrt(2 / (5 * config.hidden_size))
    residual_std = std / math.sqrt(2 * config.num_layers)
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            continue
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        writes_residual = name.endswith(("attention.output.weight", "feed_forward.output.weight"))
        _fill_normal(parameter, residual_std if writes_residual else std, _seed_of(seed, name))


def _seed_of(seed: int, name: str) -> int:
    for prefix in _WRAPPER_PREFIXES:
        name = name.replace(prefix, "")
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "big") >> 1


def _fill_normal(parameter: torch.Tensor, std: float, seed: int) -> None:
    generator = torch.Generator(parameter.device).manual_seed(seed)
    # Drawn in float32 whatever the parameter's type: bfloat16 weights are then the rounded float32 ones.
    values = torch.empty(parameter.shape, device=parameter.device, dtype=torch.float32)
    values.normal_(0.0, std, generator=generator)
    if isinstance(parameter, DTensor):
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(values)
