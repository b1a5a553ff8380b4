"""A plain decoder, compiled: what gpt-fast showed (PyTorch, 2023), in our words and over our own weights.

One token through all layers in plain PyTorch: a static cache that every token is written into, attention by SDPA over all
of its slots under a mask, products of one row as reductions that the compiler tunes (coordinate descent), and CUDA
graphs, so that nothing is launched from Python. Compiled as a whole, as published (`mode="reduce-overhead",
fullgraph=True`), 36 layers are traced and compiled one by one; so the other way compiles one block, which all layers
run, by `mode="max-autotune-no-cudagraphs"`, and captures the whole token in one graph.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch._inductor.config as inductor
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.decoding.workload import (
    SMALL,
    cache_for,
    config_for,
    drawn,
    prompts,
    random_model,
    slots_for,
    speaker,
    tell,
)
from benchmarks.training.records import between, device, error_of, mark, synchronize
from model import KeyValueCache, UnifiedTransformer, UnifiedTransformerConfig
from model.rope import rotation_of

BLOCK_MODE = "max-autotune-no-cudagraphs"
WHOLE_MODE = "reduce-overhead"


def time_compiled(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Milliseconds a token, compiled by blocks or as a whole."""
    say, way = speaker(arguments, "compiled"), option["way"]
    inductor.coordinate_descent_tuning = True
    say("agreement", way="not compiled", error_against_float64=plain_error())
    model = random_model(config_for(arguments))
    cache = cache_for(model, 1, slots_for(arguments))
    ids, kinds = prompts(arguments, model.config, 1)
    model.prefill(ids, kinds, cache)
    plain = PlainDecoder(model, cache)
    began = time.perf_counter()
    step = whole_step(plain) if way == "whole" else captured_step(plain)
    token, place = ids[:, :1].clone(), torch.full((1,), arguments.prompt, device=device())
    found, _ = step(token, place)
    say(
        "agreement", way=way, error_against_ours=error_of(found, exact_logits(model, cache, token)),
        compile_s=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    for _ in range(3):
        place += 1
        token.copy_(step(token, place)[1])
    synchronize()
    first = mark()
    for _ in range(arguments.tokens):
        place += 1
        token.copy_(step(token, place)[1])
    last = mark()
    synchronize()
    tell(
        say, arguments, f"by {way}", rows=1, ms=between(first, last) / arguments.tokens, tokens=arguments.tokens,
        mode=WHOLE_MODE if way == "whole" else BLOCK_MODE,
    )  # fmt: skip


class PlainDecoder(nn.Module):
    """One token through our weights; rows of one length."""

    cos: Tensor
    sin: Tensor
    places: Tensor

    def __init__(self, model: UnifiedTransformer, cache: KeyValueCache) -> None:
        """Take the prompt's keys and values over from our cache."""
        super().__init__()
        self.model = model
        config, weight = model.config, model.final_norm.weight
        # Slots behind heads, as SDPA wants them; one tensor a layer.
        for name, held in (("keys", cache.keys), ("values", cache.values)):
            for index, layer in enumerate(held):
                self.register_buffer(f"{name}{index}", layer.transpose(1, 2).contiguous(), persistent=False)
        places = torch.arange(cache.max_length, device=weight.device)
        cos, sin = rotation_of(places, config.head_size, config.rope_theta, weight.dtype)
        self.register_buffer("cos", cos.view(len(places), -1), persistent=False)
        self.register_buffer("sin", sin.view(len(places), -1), persistent=False)
        self.register_buffer("places", places, persistent=False)
        self.block: Callable[..., Tensor] = run_block
        self.last: Callable[..., tuple[Tensor, Tensor]] = choose

    def forward(self, token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Read the token [B, 1] at the position int64 [1].

        Returns:
            Logits [B, V], and the next token, int64 [B, 1].
        """
        model: Any = self.model
        config = self.model.config
        x = F.embedding(token, model.embeddings["image"].weight) + model.modality_embedding.weight[1]
        cos, sin = self.cos[place], self.sin[place]
        seen = (self.places <= place)[None, None, None]
        for index, block in enumerate(model.blocks):
            attention, feed_forward = block.attention, block.feed_forward
            x = self.block(
                x, place, seen, cos, sin, getattr(self, f"keys{index}"), getattr(self, f"values{index}"),
                block.attention_norm.weight, attention.qkv.weight, attention.output.weight,
                block.feed_forward_norm.weight, feed_forward.input.weight, feed_forward.output.weight,
                config.layer_norm_eps,
            )  # fmt: skip
        return self.last(x, model.final_norm.weight, model.heads["image"].weight, config.layer_norm_eps)


def run_block(
    x: Tensor, place: Tensor, seen: Tensor, cos: Tensor, sin: Tensor, keys: Tensor, values: Tensor, norm: Tensor,
    qkv: Tensor, output: Tensor, middle_norm: Tensor, wide: Tensor, narrow: Tensor, eps: float,
) -> Tensor:  # fmt: skip
    """x [B, 1, D] through one layer; keys and values [B, N, S, H]."""
    B, _, D = x.shape
    N, H = keys.shape[1], keys.shape[3]
    parts = F.linear(F.layer_norm(x, (D,), norm, None, eps), qkv).view(B, 1, 3, N, H)
    q, k, v = (part.transpose(1, 2) for part in parts.unbind(2))
    keys[:, :, place] = turned(k, cos, sin)
    values[:, :, place] = v
    mixed = F.scaled_dot_product_attention(turned(q, cos, sin), keys, values, attn_mask=seen)
    x = x + F.linear(mixed.transpose(1, 2).reshape(B, 1, D), output)
    return x + F.linear(F.gelu(F.linear(F.layer_norm(x, (D,), middle_norm, None, eps), wide)), narrow)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """[B, N, 1, H], by cosines and sines [1, H/2]."""
    left, right = x.chunk(2, dim=-1)
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def choose(x: Tensor, norm: Tensor, head: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Logits [B, V] of hidden states [B, 1, D], and a drawn token, int64 [B, 1]."""
    logits = F.linear(F.layer_norm(x[:, 0], norm.shape, norm, None, eps), head)
    return logits, drawn(logits)[:, None]


Step = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def whole_step(plain: PlainDecoder) -> Step:
    """The whole token compiled; CUDA graphs are the compiler's."""
    compiled = torch.compile(plain, mode=WHOLE_MODE, fullgraph=True, dynamic=False)

    def step(token: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        torch.compiler.cudagraph_mark_step_begin()
        return compiled(token, place)

    # Its first calls compile, then warm up, then record.
    token, place = (torch.zeros(shape, dtype=torch.int64, device=device()) for shape in ((1, 1), (1,)))
    for _ in range(3):
        step(token, place + len(plain.places) - 1)
    return step


def captured_step(plain: PlainDecoder) -> Step:
    """One block and the head compiled; all layers captured in a graph where there is a GPU."""
    plain.block = torch.compile(run_block, mode=BLOCK_MODE, fullgraph=True, dynamic=False)
    plain.last = torch.compile(choose, mode=BLOCK_MODE, fullgraph=True, dynamic=False)
    token, place = (torch.zeros(shape, dtype=torch.int64, device=device()) for shape in ((1, 1), (1,)))
    place += len(plain.places) - 1
    if device().type != "cuda":
        plain(token, place)
        return plain
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            plain(token, place)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = plain(token, place)

    def step(new: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        token.copy_(new)
        place.copy_(at)
        graph.replay()
        return results

    return step


def exact_logits(model: UnifiedTransformer, cache: KeyValueCache, token: Tensor) -> Tensor:
    """What our own eager step says of the token, in the model's type."""
    return model.image_logits(model.decode_step(token[:, 0], torch.ones_like(token[:, 0]), cache))


def plain_error() -> float:
    """A small model's plain steps in float64 against our full forward pass."""
    model = UnifiedTransformer(UnifiedTransformerConfig(**SMALL), seed=0).double().eval()
    ids = torch.randint(300, (2, 24), generator=torch.Generator().manual_seed(0))
    right = model(ids, torch.ones_like(ids))[0][:, 20:]
    cache = KeyValueCache(model.config, 2, 40, dtype=torch.float64)
    model.prefill(ids[:, :20], torch.ones_like(ids[:, :20]), cache)
    plain = PlainDecoder(model, cache)
    found = [plain(ids[:, t : t + 1], torch.tensor([t]))[0] for t in range(20, 24)]
    return error_of(torch.stack(found, dim=1), right)
