"""Attention over packs of any shape against loops over their documents, forward and backward."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from model.attention import attend, plan_attention
from tests.model.cases import tiny_config


def attention_by_loops(q: Tensor, k: Tensor, v: Tensor, documents: list[tuple[int, int]]) -> Tensor:
    """Causal attention [tokens, N, H] head by head and query by query, inside documents [start, end)."""
    out = torch.zeros_like(q)
    for start, end in documents:
        for t in range(start, end):
            for n in range(q.shape[1]):
                scores = torch.stack([q[t, n] @ k[s, n] for s in range(start, t + 1)]) / q.shape[2] ** 0.5
                # Numbers of a few standard deviations: nothing overflows without the largest taken off.
                weights = scores.exp() / scores.exp().sum()
                mixed = sum(weight * v[start + i, n] for i, weight in enumerate(weights))
                out = out.index_put((torch.tensor(t), torch.tensor(n)), mixed)
    return out


@given(
    lengths=st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    spare=st.integers(0, 3),
    room=st.integers(0, 4),
    heads=st.integers(1, 2),
    head_size=st.sampled_from(range(8, 65, 8)),
    seed=st.integers(0, 1000),
)
# One document fills each row, which runs without a mask; and empty documents between and behind others.
@example(lengths=[[5], [5]], spare=0, room=2, heads=2, head_size=8, seed=0)
@example(lengths=[[0, 3, 0, 2], [0, 0], [1, 0]], spare=1, room=3, heads=1, head_size=64, seed=0)
@settings(max_examples=20, derandomize=True)
def test_attention_and_its_gradients_are_those_of_loops_over_the_documents_of_any_pack(
    lengths: list[list[int]], spare: int, room: int, heads: int, head_size: int, seed: int
) -> None:
    T = max(1, max(map(sum, lengths)) + spare)
    # What is left of a row is a document too, as `PackedBatch` has it.
    filled = [[*row, T - sum(row)] for row in lengths]
    starts = list(accumulate((length for row in filled for length in row), initial=0))
    documents = [(start, end) for start, end in pairwise(starts) if start < end]
    generator = torch.Generator().manual_seed(seed)
    q, k, v, gradient = torch.randn(4, len(lengths), T, heads, head_size, generator=generator, dtype=torch.float64)
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    plan = plan_attention(
        tiny_config(hidden_size=heads * head_size, num_attention_heads=heads, attention_backend="sdpa"),
        torch.empty(len(lengths), T, heads * head_size, dtype=torch.float64),
        cu_seqlens=torch.tensor(starts + [len(lengths) * T] * room, dtype=torch.int32),
        max_seqlen=T,
    )
    assert plan.positions.flatten().tolist() == [t for start, end in documents for t in range(end - start)]
    out = attend(*leaves, plan)
    flat = [x.flatten(0, 1).clone().requires_grad_() for x in (q, k, v)]
    expected = attention_by_loops(*flat, documents)
    torch.testing.assert_close(out.flatten(0, 1), expected, atol=1e-12, rtol=0)
    found = torch.autograd.grad(out, leaves, gradient)
    for name, ours, right in zip(
        "qkv", found, torch.autograd.grad(expected, flat, gradient.flatten(0, 1)), strict=True
    ):
        torch.testing.assert_close(ours.flatten(0, 1), right, atol=1e-12, rtol=0, msg=f"gradient of {name}")
