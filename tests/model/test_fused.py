"""The fused block and what it is made of, in float64 against plain PyTorch, and its float32 sums of gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from model import BlockBackendError, PackedBatch, TransformerBlock, UnifiedTransformer, float8
from model.attention import plan_attention
from tests.model.cases import random_rows, tiny_config

ROWS = [[5, 9, 1], [12, 3]]


def gradients(model: UnifiedTransformer, batch: PackedBatch) -> dict[str, Tensor]:
    model.loss(batch).total.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def pair(**changes: Any) -> tuple[UnifiedTransformer, UnifiedTransformer]:
    """The same weights in plain and in fused blocks, float64."""
    plain, fused = (
        UnifiedTransformer(tiny_config(block_backend=choice, **changes), seed=3).double()
        for choice in ("torch", "fused")
    )
    return plain, fused


@pytest.mark.parametrize(
    ("recompute", "keep"),
    [("none", "least"), ("none", "all"), ("feed_forward", "least"), ("feed_forward", "all"), ("all", "least")],
)
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rope": False}, {"tie_text_embeddings": False}, {"qk_norm": True}, {"qk_norm": True, "use_rope": False}],
    ids=str,
)
def test_fused_blocks_have_the_loss_and_gradients_of_plain_ones(
    changes: dict[str, Any], recompute: str, keep: str
) -> None:
    plain, fused = pair(**changes)
    for block in fused.blocks:
        block.recompute, block.keep = recompute, keep  # type: ignore[assignment]
    batch = PackedBatch.from_sequences(random_rows(ROWS), length=17)
    expected, found = gradients(plain, batch), gradients(fused, batch)
    assert (plain.block_backend, fused.block_backend) == ("torch", "fused")
    assert expected.keys() == found.keys()
    for name, right in expected.items():
        torch.testing.assert_close(found[name], right, atol=1e-12, rtol=0, msg=name)


def test_gradients_of_the_fused_block_pass_gradcheck() -> None:
    config = tiny_config(hidden_size=4, num_attention_heads=2, ffn_hidden_size=3, block_backend="fused")
    block = TransformerBlock(config).double()
    # What is not kept is made anew in each of gradcheck's backward passes.
    block.recompute = "all"
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)

    def run(y: Tensor, *_: Tensor) -> Tensor:
        plan = plan_attention(config, y, cu_seqlens=torch.tensor([0, 2, 5], dtype=torch.int32))
        plan.fused = True
        return block(y, plan)

    assert torch.autograd.gradcheck(run, (x, *block.parameters()))


def test_a_second_backward_pass_through_a_fused_block_is_refused() -> None:
    _, fused = pair()
    batch = PackedBatch.from_sequences(random_rows(ROWS))
    hidden = fused.hidden_states(batch.token_ids, batch.modality_ids).sum()
    hidden.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward pass through a fused block; set block_backend to 'torch'"):
        hidden.backward()


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"norm_placement": "reordered"}, "norm_placement"),
        ({"dropout": 0.1}, "dropout is 0.1"),
    ],
)
def test_a_forced_fused_block_that_cannot_run_says_why(changes: dict[str, Any], reason: str) -> None:
    model = UnifiedTransformer(tiny_config(block_backend="fused", **changes))
    with pytest.raises(BlockBackendError, match=f"block_backend is 'fused', but .*{reason}.*set it to 'auto'"):
        model.loss(PackedBatch.from_sequences(random_rows(ROWS)))


@pytest.mark.parametrize("blocks", ["torch", "fused"])
def test_float32_sums_beside_bfloat16_weights_are_the_gradients_of_all_batches(blocks: str) -> None:
    batches = [PackedBatch.from_sequences(random_rows(ROWS, seed=seed)) for seed in range(3)]
    exact = UnifiedTransformer(tiny_config(), seed=1).bfloat16().double()
    for batch in batches:
        exact.loss(batch, denominators={"text": 9, "image": 9, "audio": 9}).total.backward()
    model = UnifiedTransformer(tiny_config(block_backend=blocks), seed=1).bfloat16()
    for parameter in model.parameters():
        parameter.grad_dtype = torch.float32
        parameter.grad = torch.zeros_like(parameter, dtype=torch.float32)
    sums = {name: parameter.grad for name, parameter in model.named_parameters()}
    for batch in batches:
        model.loss(batch, denominators={"text": 9, "image": 9, "audio": 9}).total.backward()
    for (name, parameter), right in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert parameter.grad is sums[name], f"{name}: the sums lie where they lay"
        assert parameter.grad.dtype == torch.float32
        error = (parameter.grad.double() - right.grad).norm() / right.grad.norm()
        assert error < 0.02, name


def test_float8_products_are_near_exact_ones_and_scale_with_their_operands() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(n, 64, generator=generator, dtype=torch.bfloat16) for n in (48, 32))
    gradient = torch.randn(48, 32, generator=generator, dtype=torch.bfloat16)
    peaks = float8.Peaks.of(weight)
    for scale in (1e-4, 1.0, 1e4):
        for found, exact in [
            (float8.product(x * scale, weight, peaks), (x * scale).double() @ weight.double().T),
            (float8.input_gradient(gradient * scale, weight, peaks), (gradient * scale).double() @ weight.double()),
        ]:
            assert (found.double() - exact).norm() / exact.norm() < 0.07
    assert not float8.product(torch.zeros_like(x), weight, peaks).any()


def test_training_in_float8_follows_bfloat16() -> None:
    batch = PackedBatch.from_sequences(random_rows(ROWS))
    exact, rounded = (UnifiedTransformer(tiny_config(block_backend="fused"), seed=2).bfloat16() for _ in range(2))
    for block in rounded.blocks:
        block.float8 = True  # type: ignore[assignment]
    expected, found = gradients(exact, batch), gradients(rounded, batch)
    for name, right in expected.items():
        error = (found[name].double() - right.double()).norm() / right.double().norm()
        assert 0 < error < 0.25, name
