"""Causal attention over packed sequences, by whichever kernel is there.

One forward pass makes one `AttentionPlan` (who attends to whom, and how far each position turns); every layer calls
`attend` with it. A backend is an entry of `BACKENDS`: why it cannot run here, if it cannot, and the kernel.

| name         | what runs                                       | needs                                             |
|--------------|-------------------------------------------------|---------------------------------------------------|
| `flash_attn_4` | `flash_attn_varlen_func` of flash-attn-4 | flash-attn-4, a Hopper GPU or later, the same types |
| `flash_attn` | `flash_attn_varlen_func` of the package         | flash-attn installed, CUDA, bfloat16 or float16   |
| `varlen`     | `torch.nn.attention.varlen`: torch's own copy   | torch >= 2.11, CUDA, bfloat16 or float16          |
| `sdpa`       | `scaled_dot_product_attention`, mask by document | nothing                                           |

Shapes: B batch, T tokens, S slots attended to, N heads, H head size.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from model.cache import KeyValueCache
from model.config import UnifiedTransformerConfig
from model.rope import rotation_of

logger = logging.getLogger(__name__)


class AttentionBackendError(RuntimeError):
    """The attention backend that the configuration forces cannot run here; the message says why."""


class AttentionPlan:
    """What all layers of one forward pass share.

    Deliberately no dataclass or tuple: FSDP2 casts every floating tensor that it finds inside those to the compute
    type, and the rotation must stay in float32.
    """

    __slots__ = ("backend", "cu_seqlens", "fused", "mask", "max_seqlen", "positions", "rotation")

    def __init__(
        self,
        *,
        backend: str,
        positions: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int = 0,
    ) -> None:
        self.backend = backend
        """Key of `BACKENDS`."""
        self.positions = positions
        """integer [B, T]: index of each token in its document."""
        self.rotation = rotation
        """Cosines and sines [B, T, 1, H/2], or None without rotary positions."""
        self.mask = mask
        """For `sdpa`: bool [B, 1, T, S], True where a query sees a key; None means plain causal rows."""
        self.cu_seqlens = cu_seqlens
        """For the packed kernels: int32 document starts in the flattened B*T."""
        self.max_seqlen = max_seqlen
        self.fused = False
        """Blocks run as `model.fused` computes them."""


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention."""

    unavailable: Callable[[torch.device, torch.dtype, int], str | None]
    """(device, dtype, head size) -> why it cannot run there, or None."""
    attend: Callable[[Tensor, Tensor, Tensor, AttentionPlan], Tensor]
    """(q [B, T, N, H], k and v [B, S, N, H], plan) -> [B, T, N, H]."""
    packed: bool
    """Takes `cu_seqlens` rather than a mask."""


def attend(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention inside each document.

    Args:
        q: [B, T, N, H].
        k: [B, S, N, H], where S is T, or the slots of a cache.
        v: [B, S, N, H].

    Returns:
        [B, T, N, H].
    """
    return BACKENDS[plan.backend].attend(q, k, v, plan)


def largest_logit(q: Tensor, k: Tensor, plan: AttentionPlan) -> Tensor:
    """The largest scaled product of a query and a key that it sees, over the first row: float32 scalar.

    Args:
        q: [B, T, N, H].
        k: [B, T, N, H].
    """
    T, N, H = q.shape[1:]
    index = torch.arange(T, device=q.device)
    behind = index[:, None] - index
    seen = (behind >= 0) & (behind <= plan.positions[0][:, None])
    # Head by head: all at once would take N T^2 numbers.
    peaks = [(q[0, :, n] @ k[0, :, n].T).float().masked_fill_(~seen, -math.inf).amax() for n in range(N)]
    return torch.stack(peaks).amax() / math.sqrt(H)


def select_backend(config: UnifiedTransformerConfig, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs for this configuration, device and compute type.

    Raises:
        AttentionBackendError: `config.attention_backend` names one that cannot run here.
    """
    if config.attention_backend != "auto":
        reason = BACKENDS[config.attention_backend].unavailable(device, dtype, config.head_size)
        if reason is not None:
            raise AttentionBackendError(
                f"attention_backend is {config.attention_backend!r}, but {reason}; "
                "set it to 'auto' to use what there is"
            )
        return config.attention_backend
    if not config.use_flash_attention:
        return "sdpa"
    return next(name for name, b in BACKENDS.items() if b.unavailable(device, dtype, config.head_size) is None)


def plan_attention(
    config: UnifiedTransformerConfig,
    x: Tensor,
    *,
    positions: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    cache: KeyValueCache | None = None,
) -> AttentionPlan:
    """Prepare one forward pass; the arguments are those of `UnifiedTransformer.hidden_states`.

    Args:
        x: [B, T, hidden]; only its shape, device and dtype count.
    """
    B, T = x.shape[:2]
    dtype = torch.get_autocast_dtype(x.device.type) if torch.is_autocast_enabled(x.device.type) else x.dtype
    if positions is None:
        positions = _default_positions(B, T, x.device, cu_seqlens, cache)
    rotation = rotation_of(positions, config.head_size, config.rope_theta, dtype) if config.use_rope else None
    if cache is not None:
        # The last slot that any row fills is known on the host, so nothing waits for the device.
        slots = torch.arange(cache.occupied + T, device=x.device)
        seen = (slots <= positions[:, :, None])[:, None]
        return AttentionPlan(backend="sdpa", positions=positions, rotation=rotation, mask=seen)
    backend = select_backend(config, x.device, dtype)
    if BACKENDS[backend].packed:
        if cu_seqlens is None or max_seqlen is None:
            max_seqlen = T
        if cu_seqlens is None:
            cu_seqlens = _row_starts(B, T, x.device)
        return AttentionPlan(
            backend=backend, positions=positions, rotation=rotation, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen
        )
    mask = None if cu_seqlens is None else _block_causal_mask(cu_seqlens, B, T)
    return AttentionPlan(backend=backend, positions=positions, rotation=rotation, mask=mask)


def _row_starts(rows: int, length: int, device: torch.device) -> Tensor:
    return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=device)


def _document_of_token(cu_seqlens: Tensor, rows: int, length: int) -> Tensor:
    flat = torch.arange(rows * length, dtype=cu_seqlens.dtype, device=cu_seqlens.device)
    return torch.searchsorted(cu_seqlens, flat, right=True).view(rows, length) - 1


def _default_positions(
    rows: int, length: int, device: torch.device, cu_seqlens: Tensor | None, cache: KeyValueCache | None
) -> Tensor:
    index = torch.arange(length, device=device).expand(rows, length)
    if cache is not None:
        return cache.lengths[:, None] + index
    if cu_seqlens is None:
        return index
    flat = torch.arange(rows * length, device=device).view(rows, length)
    return flat - cu_seqlens[_document_of_token(cu_seqlens, rows, length)]


def _block_causal_mask(cu_seqlens: Tensor, rows: int, length: int) -> Tensor | None:
    device = cu_seqlens.device
    # On the CPU looking is free, though not in a graph, and plain causal rows let the kernel skip half of the work.
    free = device.type == "cpu" and not torch.compiler.is_compiling()
    if free and torch.equal(cu_seqlens.unique(), _row_starts(rows, length, device)):
        return None
    document = _document_of_token(cu_seqlens, rows, length)
    same = document[:, :, None] == document[:, None, :]
    return torch.ones(length, length, dtype=torch.bool, device=device).tril().logical_and(same)[:, None]


def _sdpa(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=plan.mask, is_causal=plan.mask is None)
    return out.transpose(1, 2)


def _varlen(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from torch.nn.attention.varlen import varlen_attn

    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
    starts, longest = cast(Tensor, plan.cu_seqlens), plan.max_seqlen
    # (-1, 0): any distance to the left, nothing to the right; this is how the function spells causal.
    out = varlen_attn(q_flat, k_flat, v_flat, starts, starts, longest, longest, window_size=(-1, 0))
    return cast(Tensor, out).view(q.shape)


def _flash_attn(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from flash_attn.flash_attn_interface import flash_attn_varlen_func

    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
    starts, longest = plan.cu_seqlens, plan.max_seqlen
    out = flash_attn_varlen_func(q_flat, k_flat, v_flat, starts, starts, longest, longest, causal=True)
    return out.view(q.shape)


def _flash_attn_4(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    from flash_attn.cute import flash_attn_varlen_func

    q_flat, k_flat, v_flat = (x.flatten(0, 1) for x in (q, k, v))
    starts, longest = plan.cu_seqlens, plan.max_seqlen
    out, *_ = flash_attn_varlen_func(
        q_flat, k_flat, v_flat, cu_seqlens_q=starts, cu_seqlens_k=starts, max_seqlen_q=longest, max_seqlen_k=longest,
        causal=True,
    )  # fmt: skip
    return cast(Tensor, out).view(q.shape)


def _no_flash_4_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    if (reason := _no_flash_kernel(device, dtype, head_size)) is not None:
        return reason
    if torch.cuda.get_device_capability(device) < (9, 0):
        return f"it needs a Hopper GPU or later and this is {torch.cuda.get_device_name(device)}"
    if head_size not in (64, 96, 128):
        return f"it takes head sizes 64, 96 and 128 and this is {head_size}"
    return None


# Constant to torch.compile, which would go into it, and cannot import.
@lru_cache
@torch.compiler.assume_constant_result
def unusable(package: str, module: str, install: str) -> str | None:
    """Why `flash_attn_varlen_func` of a package cannot be called, or None. Said in a warning if the package is installed.

    Args:
        module: that has it; two packages share the name `flash_attn`.
        install: how to get the package.
    """
    try:
        # Looking for a module imports those above it.
        if not (importlib.util.find_spec("flash_attn") and importlib.util.find_spec(module)):
            return f"the package {package} is not installed ({install})"
        function = importlib.import_module(module).flash_attn_varlen_func
        takes = inspect.signature(function).parameters
    # Whatever a package runs into that does not fit the torch, or the packages, that are here.
    except Exception as error:
        problem = f"{type(error).__name__}: {error}"
        reason = f"the package {package} cannot be imported ({problem}); install it for torch {torch.__version__} ({install})"
        with suppress(PackageNotFoundError):
            version(package)
            logger.warning("%s", reason)
        return reason
    if "max_seqlen_q" not in takes:
        return f"{module} takes no max_seqlen_q, so it is not the package {package} as it is now ({install})"
    return None


def _no_flash_kernel(device: torch.device, dtype: torch.dtype, head_size: int) -> str | None:
    if device.type != "cuda":
        return f"it needs a CUDA device and this is {device.type}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs an Ampere GPU or later and this is {torch.cuda.get_device_name(device)}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it computes in bfloat16 or float16 and this is {str(dtype).removeprefix('torch.')}"
    if head_size % 8 or head_size > 256:
        return f"it takes head sizes that are multiples of 8 up to 256 and this is {head_size}"
    return None


@lru_cache
def _varlen_missing() -> str | None:
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        from torch.nn.attention.varlen import varlen_attn

        if "window_size" in inspect.signature(varlen_attn).parameters:
            return None
    return f"it needs torch 2.11 or later and this is {torch.__version__}"


_FLASH_ATTN = "flash-attn", "flash_attn.flash_attn_interface", "pip install flash-attn"
_FLASH_ATTN_4 = "flash-attn-4", "flash_attn.cute", "pip install --pre flash-attn-4"

BACKENDS: dict[str, Backend] = {
    "flash_attn_4": Backend(
        lambda *at: _no_flash_4_kernel(*at) or unusable(*_FLASH_ATTN_4), _flash_attn_4, packed=True
    ),
    "flash_attn": Backend(lambda *at: _no_flash_kernel(*at) or unusable(*_FLASH_ATTN), _flash_attn, packed=True),
    "varlen": Backend(lambda *at: _varlen_missing() or _no_flash_kernel(*at), _varlen, packed=True),
    "sdpa": Backend(lambda *at: None, _sdpa, packed=False),
}
"""By name, in the order in which "auto" tries them."""
