"""The model against a second implementation in numpy and plain loops, in float64."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model import (
    MODALITIES,
    CausalSelfAttention,
    PackedBatch,
    RotaryPositionalEmbeddings,
    Targets,
    TransformerBlock,
    UnifiedTransformer,
)
from model.attention import AttentionPlan, attend
from model.config import NormPlacement
from model.heads import head_losses
from tests.model.cases import random_rows, tiny_config
from tests.model.reference import Reference, attention_of_document, rope

VARIANTS = [
    {},
    {"tie_text_embeddings": False},
    {"use_rope": False},
    {"qk_norm": True, "rope_theta": 500.0},
    {"loss_chunk_tokens": 3, "z_loss_weight": 0.1},
    {"norm_placement": "reordered"},
    {"norm_placement": "reordered", "qk_norm": True, "use_rope": False},
]


def double_model(**changes: object) -> UnifiedTransformer:
    model = UnifiedTransformer(tiny_config(**changes), seed=3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
    return model


def test_rotary_positions_match_complex_rotations() -> None:
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 8, 0, 1, 4000]])
    out = RotaryPositionalEmbeddings(8, theta=100.0)(x, positions)
    for b, t, n in np.ndindex(2, 5, 3):
        expected = rope(x[b, t, n].numpy(), int(positions[b, t]), 100.0)
        np.testing.assert_allclose(out[b, t, n].numpy(), expected, atol=1e-13)


def test_rotary_scores_depend_on_distance_alone() -> None:
    turn = RotaryPositionalEmbeddings(16)
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)

    def score(i: int, j: int) -> float:
        return float((turn(q, torch.tensor([i])) * turn(k, torch.tensor([j]))).sum())

    assert score(9, 4) == pytest.approx(score(3009, 3004), abs=1e-10)
    assert turn(q.bfloat16()).dtype == torch.bfloat16


def test_attention_matches_loops_on_packed_documents() -> None:
    lengths = [4, 1, 6]
    q, k, v = torch.randn(3, 1, 11, 2, 4, dtype=torch.float64)
    document = torch.repeat_interleave(torch.tensor(lengths))
    mask = (document[:, None] == document) & torch.ones(11, 11, dtype=torch.bool).tril()
    plan = AttentionPlan(backend="sdpa", positions=torch.zeros(1, 11), rotation=None, mask=mask[None, None])
    out = attend(q, k, v, plan).flatten(2)[0]
    start = 0
    for length in lengths:
        part = slice(start, start + length)
        flat = [list(x[0, part].flatten(1).numpy()) for x in (q, k, v)]
        np.testing.assert_allclose(out[part].numpy(), attention_of_document(*flat, num_heads=2), atol=1e-12)
        start += length


# All that there are, so that a new one needs its formula in the reference.
@pytest.mark.parametrize("norm_placement", get_args(NormPlacement))
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_module_and_block_match_loops(qk_norm: bool, norm_placement: str) -> None:
    model = double_model(qk_norm=qk_norm, norm_placement=norm_placement)
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    block, reference = model.blocks[1], Reference(model)
    assert isinstance(block, TransformerBlock)
    assert isinstance(block.attention, CausalSelfAttention)
    for b in range(2):
        xs = list(x[b].numpy())
        np.testing.assert_allclose(
            block.attention(x)[b].detach().numpy(), reference.attention(xs, "blocks.1.attention"), atol=1e-12
        )
        np.testing.assert_allclose(block(x)[b].detach().numpy(), reference.block(xs, "blocks.1"), atol=1e-12)


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_loss_of_a_packed_batch_matches_loops_over_its_documents(changes: dict[str, object]) -> None:
    model = double_model(**changes)
    rows = random_rows([[5, 9, 1], [12]])
    batch = PackedBatch.from_sequences(rows, length=17, capacity=20)
    expected: dict[str, list[float]] = {name: [] for name in MODALITIES}
    log_partitions: dict[str, list[float]] = {name: [] for name in MODALITIES}
    reference = Reference(model)
    for row in rows:
        for ids, modalities in row:
            for name, nll, log_partition in reference.losses(ids.tolist(), modalities.tolist()):
                expected[name].append(nll)
                log_partitions[name].append(log_partition)
    losses = model.token_losses(batch)
    for name in MODALITIES:
        assert batch.targets[name].count == len(expected[name]) > 0
        padded = expected[name] + [0.0] * (20 - len(expected[name]))
        np.testing.assert_allclose(losses[name].detach().numpy(), padded, atol=1e-11)

    weights, denominators = {"text": 1.0, "image": 0.5, "audio": 2.0}, {"text": 40, "image": 30, "audio": 20}
    output = model.loss(batch, weights=weights, denominators=denominators)
    scale = sum(weights[name] * denominators[name] for name in MODALITIES)
    z = model.config.z_loss_weight
    z_loss = sum(weights[n] * z * sum(value**2 for value in log_partitions[n]) for n in MODALITIES) / scale
    total = sum(weights[name] * sum(expected[name]) for name in MODALITIES) / scale + z_loss
    assert output.total.item() == pytest.approx(total, abs=1e-11)
    assert float(output.z_loss) == pytest.approx(z_loss, abs=1e-11)
    assert {n: float(s) for n, s in output.sums.items()} == pytest.approx({n: sum(expected[n]) for n in MODALITIES})


@pytest.mark.parametrize(("chunk", "vocabulary"), [(2, 7), (100, 7), (100, 64), (2, 131)])
def test_the_heads_loss_and_its_gradients_are_those_of_naive_full_logits(chunk: int, vocabulary: int) -> None:
    hidden = torch.randn(6, 4, dtype=torch.float64, requires_grad=True)
    heads = [torch.randn(size, 4, dtype=torch.float64, requires_grad=True) for size in (vocabulary, 5, 3)]
    places = {0: [0, 3, 5, 0, 0], 1: [1, 2], 2: [0, 0]}
    ids = {0: [3, 0, 6, -100, -100], 1: [4, 0], 2: [-100, -100]}
    targets = [
        Targets(positions=torch.tensor(places[m]), ids=torch.tensor(ids[m]), count=sum(i >= 0 for i in ids[m]))
        for m in range(3)
    ]
    coefficients, z = torch.tensor([0.5, 0.25, 2.0], dtype=torch.float64), 0.1
    naive = hidden.new_zeros(())
    for target, weight, coefficient in zip(targets, heads, coefficients, strict=True):
        logits = (hidden @ weight.T)[target.positions[: target.count]]
        nll = F.cross_entropy(logits, target.ids[: target.count], reduction="sum")
        naive = naive + coefficient * (nll + z * logits.logsumexp(-1).square().sum())
    expected = torch.autograd.grad(3 * naive, (hidden, *heads))
    total, *_ = head_losses(hidden, targets, heads, coefficients, z, chunk)
    torch.testing.assert_close(total, naive, atol=1e-12, rtol=0)
    # Not 1 arrives in the backward pass, and it must count.
    for found, right in zip(torch.autograd.grad(3 * total, (hidden, *heads)), expected, strict=True):
        torch.testing.assert_close(found, right, atol=1e-12, rtol=0)


def test_gradients_of_a_block_pass_gradcheck() -> None:
    config = tiny_config(hidden_size=4, num_attention_heads=2, ffn_hidden_size=3, qk_norm=True)
    block = TransformerBlock(config).double()
    x = torch.randn(1, 3, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda y, *_: block(y), (x, *block.parameters()))


def test_chunked_loss_has_the_gradients_of_the_whole_one() -> None:
    batch = PackedBatch.from_sequences(random_rows([[30, 20]]))
    chunked, whole = (UnifiedTransformer(tiny_config(loss_chunk_tokens=n), seed=5).double() for n in (4, 1000))
    for model in (chunked, whole):
        model.loss(batch).total.backward()
    for (name, one), other in zip(chunked.named_parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-12, rtol=0, msg=name)


def test_bfloat16_autocast_stays_near_float32() -> None:
    model = UnifiedTransformer(tiny_config(), seed=1)
    batch = PackedBatch.from_sequences(random_rows([[20, 12]]))
    exact = model.loss(batch).total
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = model.loss(batch).total
    mixed.backward()
    assert mixed.dtype == torch.float32
    assert mixed.item() == pytest.approx(exact.item(), rel=0.01)


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}], ids=str)
def test_attention_peaks_are_the_largest_logits_of_loops(changes: dict[str, object]) -> None:
    model = double_model(block_backend="auto" if changes else "fused", **changes)
    batch = PackedBatch.from_sequences(random_rows([[5, 9]]))
    seen: list[float] = []
    for block in model.blocks:
        attention = block.attention

        def largest(module: torch.nn.Module, args: tuple[torch.Tensor, AttentionPlan]) -> None:
            x, plan = args[0], args[1]
            q, k, _ = module.qkv(x).view(1, 14, 3, 4, 8).unbind(2)
            q, k = module.query_norm(q), module.key_norm(k)
            rope = RotaryPositionalEmbeddings(8)
            q, k = rope(q, plan.positions), rope(k, plan.positions)
            pairs = [
                (i, j) for first, last in ((0, 5), (5, 14)) for i in range(first, last) for j in range(first, i + 1)
            ]
            seen.append(max(float(q[0, i, n] @ k[0, j, n]) / 8**0.5 for i, j in pairs for n in range(4)))

        attention.register_forward_pre_hook(largest)
    peaks = model.attention_peaks(batch)
    assert peaks.tolist() == pytest.approx(seen, rel=1e-6)
    assert not any(block.attention.watching for block in model.blocks)


def test_reordered_norms_are_written_out() -> None:
    block = TransformerBlock(tiny_config(norm_placement="reordered")).double()
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    middle = x + block.attention_norm(block.attention(x))
    torch.testing.assert_close(block(x), middle + block.feed_forward_norm(block.feed_forward(middle)))
