"""One step of generation at the speed of memory: a token a row through the model, as one CUDA graph.

Enters: a model, a cache that holds the prompts, and one token a row. Leaves: the hidden states that predict the next, with
the cache one token further. Always holds: it computes what `UnifiedTransformer.decode_step` computes, to rounding; equal
input gives equal bits; a row that is not alive stays where it is. What the host knows of lengths is no part of it, so that a
step is captured once and replayed: positions are read on the device, and programs beyond a row's end leave at once.

A block is five kernels for few rows: norm and product to queries, keys and values; rotation, writing to the cache and
attention; the product back, added to x; norm, product and GELU; the product back, added to x. For more rows the products are
cuBLAS's.

Shapes: B rows, D hidden, F feed-forward, N heads, H head size, S slots of the cache.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from model import elementwise
from model.cache import KeyValueCache
from model.config import MODALITIES
from model.rope import rotation_of

if TYPE_CHECKING:
    from model.block import TransformerBlock
    from model.transformer import UnifiedTransformer

LEAST_STEPS = 32
"""Capturing takes as long as some twenty steps without."""

PROGRAMMATIC_ROWS = 8
"""Up to so many rows, kernels start while the one before them ends (programmatic dependent launch), where the GPU can
(Hopper): 4% faster with one row, and no longer faster with 16 (`benchmarks.generation`)."""


class DecodingStepError(RuntimeError):
    """The step cannot be made for this model and cache; the message says why."""


def step_unavailable(model: UnifiedTransformer, cache: KeyValueCache) -> str | None:
    """Why a `DecodingStep` cannot run there, or None."""
    config, weight = model.config, model.modality_embedding.weight
    if weight.device.type != "cuda" and not _interpreted():
        return f"it needs a CUDA device and this is {weight.device.type}"
    if not elementwise.has_triton():
        return "the package triton is not installed (pip install triton)"
    if config.norm_placement != "pre":
        return f"norm_placement is {config.norm_placement!r}, and the step's is 'pre'"
    if config.dropout and model.training:
        return f"dropout is {config.dropout}, and the step drops nothing: call eval() on the model"
    if torch.is_autocast_enabled(weight.device.type):
        return "autocast is on, and the step computes in the weights' own type"
    kinds = {p.dtype for p in model.parameters()} | {cache.keys.dtype}
    if len(kinds) > 1 or weight.dtype == torch.float64:
        names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
        return f"weights and cache hold {names}: it takes one type for all, of 32 bits at most"
    if any(type(p) is not torch.nn.Parameter or not p.is_contiguous() for p in model.parameters()):
        return "weights are sharded or not contiguous"
    return None


def _interpreted() -> bool:
    """Whether Triton's kernels run on the CPU, as its tests do."""
    return os.environ.get("TRITON_INTERPRET") == "1"


class DecodingStep:
    """Reads one token a row; made for one model and one cache, whose memory it refers to from then on."""

    def __init__(
        self, model: UnifiedTransformer, cache: KeyValueCache, alive: Tensor | None = None, *,
        programmatic: bool | None = None, graph: bool | None = None,
    ) -> None:  # fmt: skip
        """Allocate, compile and capture; the cache keeps what it holds.

        Args:
            alive: int64 [B], 1 for rows that go on and 0 for rows that stand still; read at every step, so its owner may
                change it in place. Default all go on.
            programmatic: default up to `PROGRAMMATIC_ROWS` rows.
            graph: whether to capture; default on CUDA.

        Raises:
            DecodingStepError: it cannot be made here.
        """
        if (reason := step_unavailable(model, cache)) is not None:
            raise DecodingStepError(f"no decoding step for this model: {reason}; use model.decode_step")
        from model import triton_decode, triton_decode_attention, triton_elementwise

        self._kernels, self._attention, self._gelu = triton_decode, triton_decode_attention, triton_elementwise.gelu
        self._model, self._cache = model, cache
        config, weight = model.config, model.modality_embedding.weight
        B, S, D = cache.batch_size, cache.max_length, config.hidden_size
        device, kind = weight.device, weight.dtype
        hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
        self._programmatic = hopper and (B <= PROGRAMMATIC_ROWS if programmatic is None else programmatic)
        self._ids = torch.zeros(B, dtype=torch.int64, device=device)
        self._kinds = torch.zeros(B, dtype=torch.int64, device=device)
        self._alive = torch.ones(B, dtype=torch.int64, device=device) if alive is None else alive
        self._x = torch.zeros(B, D, device=device, dtype=kind)
        self._normed = torch.zeros(B, D, device=device, dtype=kind)
        self._qkv = torch.zeros(B, 3, config.num_attention_heads, config.head_size, device=device, dtype=kind)
        self._mixed = torch.zeros(B, config.num_attention_heads, config.head_size, device=device, dtype=kind)
        self._wide = torch.zeros(B, config.ffn_hidden_size, device=device, dtype=kind)
        self._hidden = torch.zeros(B, D, device=device, dtype=kind)
        self._rotation = None
        if config.use_rope:
            places = torch.arange(S, device=device)
            cos, sin = rotation_of(places, config.head_size, config.rope_theta, kind)
            self._rotation = (cos.view(S, -1), sin.view(S, -1))
        self._scratch = triton_decode_attention.make_scratch(
            B, config.num_attention_heads, config.head_size, S, triton_decode_attention.chunk_of(B), device
        )
        self._graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda" if graph is None else graph:
            self._capture()

    def __call__(self, ids: Tensor, kinds: Tensor) -> Tensor:
        """Read one more token a row.

        Args:
            ids: int64 [B], or of a number of rows that divides B: then repeated.
            kinds: the same, modality ids.

        Returns:
            [B, D], the hidden states after the final norm. The next call overwrites them.

        Raises:
            CacheError: the cache is full, or gradients are being recorded.
        """
        self._cache.require_room(len(self._ids), 1)
        self._ids.view(-1, len(ids)).copy_(ids)
        self._kinds.view(-1, len(kinds)).copy_(kinds)
        if self._graph is None:
            self._run(self._alive)
        else:
            self._graph.replay()
        self._cache.occupied += 1
        return self._hidden

    @torch.no_grad()
    def _capture(self) -> None:
        stream = torch.cuda.Stream(self._x.device)
        stream.wait_stream(torch.cuda.current_stream(self._x.device))
        with torch.cuda.stream(stream):
            # Compiles, and moves no row: the slot that it writes is the one that the next step writes.
            self._run(torch.zeros_like(self._alive))
        torch.cuda.current_stream(self._x.device).wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream):
            self._run(self._alive)

    def _run(self, alive: Tensor) -> None:
        model, cache, kernels, pdl = self._model, self._cache, self._kernels, self._programmatic
        tables = [model.embeddings[name].get_parameter("weight") for name in MODALITIES]
        places = None if model.position_embedding is None else model.position_embedding.weight
        kernels.embed(
            self._ids, self._kinds, cache.lengths, tables, model.modality_embedding.weight, places, self._x, pdl=pdl
        )
        for index, block in enumerate(model.blocks):
            self._block(block, cache.keys[index], cache.values[index])  # type: ignore[arg-type]
        norm = model.final_norm
        kernels.norm(self._x, norm.weight, norm.eps, self._hidden, lengths=cache.lengths, alive=alive, pdl=pdl)

    def _block(self, block: TransformerBlock, keys: Tensor, values: Tensor) -> None:
        pdl = self._programmatic
        attention, feed_forward, first, second = (
            block.attention, block.feed_forward, block.attention_norm, block.feed_forward_norm
        )  # fmt: skip
        self._product(self._x, attention.qkv.weight, self._qkv.flatten(1), scale=first.weight, eps=first.eps)
        scales: Any = None
        if self._model.config.qk_norm:
            scales = (attention.query_norm.weight, attention.key_norm.weight)
        self._attention.attend(
            self._qkv, keys, values, self._cache.lengths, self._rotation, scales, first.eps, self._mixed, self._scratch,
            pdl=pdl,
        )  # fmt: skip
        self._product(self._mixed.flatten(1), attention.output.weight, self._x, add=True)
        self._product(self._x, feed_forward.input.weight, self._wide, scale=second.weight, eps=second.eps, gelu=True)
        self._product(self._wide, feed_forward.output.weight, self._x, add=True)

    def _product(
        self, x: Tensor, weight: Tensor, y: Tensor, *, scale: Tensor | None = None, eps: float = 0.0, add: bool = False,
        gelu: bool = False,
    ) -> None:  # fmt: skip
        """Write to y: gelu(norm(x) @ weight.T), or add the product to it."""
        kernels, pdl = self._kernels, self._programmatic
        if len(x) <= kernels.MOST_ROWS:
            kernels.product(
                x, weight, y, kernels.tiles_of(*weight.shape, len(x)), scale=scale, eps=eps, residual=y if add else None,
                gelu=gelu, pdl=pdl,
            )  # fmt: skip
            return
        if scale is not None:
            kernels.norm(x, scale, eps, self._normed)
            x = self._normed
        if add:
            y.addmm_(x, weight.T)
        else:
            torch.mm(x, weight.T, out=y)
        if gelu:
            self._gelu(y, y)
