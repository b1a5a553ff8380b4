"""Reading prompts into an empty cache, packed as training packs documents or row by row, is the dense pass under a mask."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from model import KeyValueCache, UnifiedTransformer, prompts
from model.attention import BACKENDS, AttentionPlan, Backend
from tests.model.cases import random_document, tiny_config

GUIDED = [9, 1, 5, 2, 2, 3]
"""Prompts, and behind them the same without their texts."""


def _document_by_document(q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan) -> Tensor:
    """What a packed kernel computes, in a loop."""
    assert plan.cu_seqlens is not None
    starts = plan.cu_seqlens.tolist()
    assert max(b - a for a, b in pairwise(starts)) <= plan.max_seqlen
    flat = [x.flatten(0, 1).transpose(0, 1) for x in (q, k, v)]
    parts = [F.scaled_dot_product_attention(*(x[:, a:b] for x in flat), is_causal=True) for a, b in pairwise(starts)]
    return torch.cat(parts, dim=1).transpose(0, 1).view(q.shape)


def _batch(lengths: list[int]) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = [random_document(max(lengths) + 3, generator) for _ in lengths]
    return torch.stack([ids for ids, _ in rows]), torch.stack([kinds for _, kinds in rows])


@pytest.mark.parametrize("most_tokens", [32768, 11])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rope": False}, {"block_backend": "fused"}, {"block_backend": "fused", "qk_norm": True}],
    ids=str,
)
def test_prompts_and_what_follows_are_those_of_the_dense_pass(
    changes: dict[str, object], packed: bool, most_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prompts, "MOST_TOKENS", most_tokens)
    if packed:
        monkeypatch.setitem(BACKENDS, "sdpa", Backend(lambda *at: None, _document_by_document, packed=True))
    model = UnifiedTransformer(tiny_config(**changes), seed=0).double().eval()
    dense = UnifiedTransformer(tiny_config(**changes | {"block_backend": "torch"}), seed=0).double().eval()
    ids, kinds = _batch(GUIDED)
    lengths, longest = torch.tensor(GUIDED), max(GUIDED)
    caches = [KeyValueCache(model.config, len(GUIDED), longest + 3, dtype=torch.float64) for _ in range(2)]
    with torch.inference_mode():
        found = model.prefill(ids[:, :longest], kinds[:, :longest], caches[0], lengths)
        assert model.block_backend == ("fused" if "block_backend" in changes else "torch")
    with torch.no_grad():
        monkeypatch.undo()
        hidden = dense.hidden_states(ids[:, :longest], kinds[:, :longest], cache=caches[1])
        caches[1].advance(longest, lengths)
        right = hidden[torch.arange(len(GUIDED)), lengths - 1]
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)
        for b, length in enumerate(GUIDED):
            for one, other in ((caches[0].keys, caches[1].keys), (caches[0].values, caches[1].values)):
                torch.testing.assert_close(one[:, b, :length], other[:, b, :length], atol=1e-12, rtol=0)
        assert torch.equal(caches[0].lengths, caches[1].lengths)
        assert caches[0].occupied == caches[1].occupied
        for t in range(3):
            steps = [each.decode_step(ids[:, longest + t], kinds[:, longest + t], cache)
                     for each, cache in zip((model, dense), caches, strict=True)]  # fmt: skip
            torch.testing.assert_close(*steps, atol=1e-12, rtol=0)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.booleans(), st.integers(1, 30))
def test_every_token_is_in_one_group_of_bounded_size(lengths: list[int], packed: bool, most_tokens: int) -> None:
    B, T = len(lengths), max(lengths)
    ids = torch.arange(B * T).view(B, T)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prompts, "MOST_TOKENS", most_tokens)
        groups = list(prompts.prompt_groups(ids, -ids, lengths, packed=packed))
    seen: list[int] = []
    ends: list[int] = []
    for group in groups:
        rows, columns = torch.broadcast_tensors(
            group.rows, torch.arange(group.token_ids.shape[1])[None] if group.positions is None else group.positions
        )
        assert torch.equal(ids[rows, columns], group.token_ids)
        assert torch.equal(group.modality_ids, -group.token_ids)
        real = columns < torch.tensor(lengths)[rows]
        assert packed <= bool(real.all())
        seen += group.token_ids[real].tolist()
        ends += group.token_ids[group.last].tolist()
        assert group.token_ids.numel() <= most_tokens or len(group.last[0]) == 1
    assert seen == [int(i) for b, length in enumerate(lengths) for i in ids[b, :length]]
    assert ends == [int(ids[b, length - 1]) for b, length in enumerate(lengths)]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", list(BACKENDS))
def test_each_backend_on_a_gpu_reads_prompts_as_float64_does(name: str) -> None:
    sizes = {"hidden_size": 256, "ffn_hidden_size": 512, "max_sequence_length": 128}
    config = tiny_config(**sizes, attention_backend=name)
    reason = BACKENDS[name].unavailable(torch.device("cuda"), torch.bfloat16, config.head_size)
    if reason is not None:
        pytest.skip(reason)
    exact = UnifiedTransformer(tiny_config(**sizes), seed=0).bfloat16().double().eval()
    model = UnifiedTransformer(config, seed=0).to("cuda", torch.bfloat16).eval()
    lengths = [100, 1, 37, 64]
    ids, kinds = _batch(lengths)
    found = []
    for each in (model, exact):
        weight = each.final_norm.weight
        cache = KeyValueCache(config, 4, 110, weight.device, weight.dtype)
        with torch.inference_mode():
            hidden = [each.prefill(*(x[:, :100].to(weight.device) for x in (ids, kinds)), cache,
                                   torch.tensor(lengths, device=weight.device))]  # fmt: skip
            hidden += [
                each.decode_step(*(x[:, 100 + t].to(weight.device) for x in (ids, kinds)), cache) for t in range(3)
            ]
        found.append(torch.stack(hidden).double().cpu())
    assert model.block_backend == "torch", "a step follows"
    assert float((found[0] - found[1]).norm() / found[1].norm()) < 0.02
