"""Generation with a cache computes what the full forward pass computes."""

from __future__ import annotations

import pytest
import torch

from model import CacheError, KeyValueCache, UnifiedTransformer
from tests.model.cases import random_document, tiny_config


@pytest.mark.parametrize("changes", [{}, {"use_rope": False}, {"qk_norm": True}], ids=str)
def test_cached_decoding_equals_the_full_forward_for_prompts_of_different_lengths(changes: dict[str, object]) -> None:
    model = UnifiedTransformer(tiny_config(**changes), seed=0).double()
    generator = torch.Generator().manual_seed(2)
    prompts, steps = [5, 11, 1], 8
    rows = [random_document(length + steps, generator) for length in prompts]
    full = [model.hidden_states(ids[None], kinds[None])[0] for ids, kinds in rows]

    padded_ids, padded_kinds = torch.ones(2, 3, max(prompts), dtype=torch.int64)
    for b, length in enumerate(prompts):
        padded_ids[b, :length], padded_kinds[b, :length] = rows[b][0][:length], rows[b][1][:length]
    cache = KeyValueCache(model.config, 3, max_length=max(prompts) + steps, dtype=torch.float64)
    hidden = model.prefill(padded_ids, padded_kinds, cache, torch.tensor(prompts))
    for step in range(steps + 1):
        for b, length in enumerate(prompts):
            torch.testing.assert_close(hidden[b], full[b][length + step - 1], atol=1e-12, rtol=0)
        if step < steps:
            ids = torch.stack([rows[b][0][length + step] for b, length in enumerate(prompts)])
            kinds = torch.stack([rows[b][1][length + step] for b, length in enumerate(prompts)])
            hidden = model.decode_step(ids, kinds, cache)
    assert cache.lengths.tolist() == [length + steps for length in prompts]


def test_a_prompt_may_arrive_in_parts_and_the_cache_be_used_again() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0).double()
    ids, kinds = (x.view(2, 10) for x in random_document(20, torch.Generator().manual_seed(3)))
    full = model.hidden_states(ids, kinds)[:, -1]
    cache = KeyValueCache(model.config, 2, max_length=10, dtype=torch.float64)
    for _ in range(2):
        cache.reset()
        for part in (slice(0, 4), slice(4, 5), slice(5, 10)):
            hidden = model.prefill(ids[:, part], kinds[:, part], cache)
        torch.testing.assert_close(hidden, full, atol=1e-12, rtol=0)


def test_what_the_cache_cannot_hold_is_refused() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0)
    ids, kinds = (x.view(2, 4) for x in random_document(8, torch.Generator().manual_seed(3)))
    with pytest.raises(CacheError, match="max_length is 65: the model is made for sequences of at most 64"):
        KeyValueCache(model.config, 2, max_length=65)
    cache = KeyValueCache(model.config, 2, max_length=6)
    model.prefill(ids, kinds, cache)
    with pytest.raises(CacheError, match="4 tokens held and 4 new ones: the cache has room for 6"):
        model.prefill(ids, kinds, cache)
    with pytest.raises(CacheError, match="1 rows for a cache of 2"):
        model.prefill(ids[:1], kinds[:1], cache)
    with pytest.raises(CacheError, match="no_grad"):
        model.hidden_states(ids[:, :1], kinds[:, :1], cache=cache)
