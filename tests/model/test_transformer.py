"""The model as users meet it: the reference snippet, weights, gradients, errors, compilation."""

from __future__ import annotations

import math

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from model import (
    MODALITIES,
    FeedForward,
    LossOutput,
    PackedBatch,
    TokenError,
    TransformerBlock,
    UnifiedTransformer,
    UnifiedTransformerConfig,
)
from model.attention import plan_attention
from tests.model.cases import SIZES, random_rows, tiny_config


def test_the_reference_snippet_runs_with_small_dimensions() -> None:
    config = UnifiedTransformerConfig(
        text_vocab_size=50257,
        image_vocab_size=16384,
        audio_vocab_size=1024,
        use_flash_attention=True,
        use_rope=True,
        hidden_size=16,
        num_layers=2,
        num_attention_heads=2,
        ffn_hidden_size=32,
    )
    model = UnifiedTransformer(config).to(config.device)
    token_ids = torch.randint(1024, (2, 12), device=config.device)
    modality_ids = torch.randint(3, (2, 12), device=config.device)
    image_logits, audio_logits = model(token_ids, modality_ids)
    assert image_logits.shape == (2, 12, 16384)
    assert audio_logits.shape == (2, 12, 1024)
    by_name = model(token_ids=token_ids, modality_ids=modality_ids)
    assert torch.equal(by_name[0], image_logits)
    assert model.text_logits(model.hidden_states(token_ids, modality_ids)).shape == (2, 12, 50257)


@pytest.mark.parametrize("tied", [True, False])
def test_text_logits_come_from_the_embedding_or_from_a_head_of_their_own(tied: bool) -> None:
    model = UnifiedTransformer(tiny_config(tie_text_embeddings=tied))
    assert ("heads.text.weight" in model.state_dict()) is not tied
    hidden = torch.randn(3, 32)
    weight = model.embeddings["text"].weight if tied else model.heads["text"].weight
    torch.testing.assert_close(model.text_logits(hidden), hidden @ weight.T)


@pytest.mark.parametrize("present", [(0,), (1,), (2,), (0, 2)])
@pytest.mark.parametrize("capacity", [None, 60])
@pytest.mark.parametrize("tied", [True, False])
def test_every_parameter_gets_a_finite_gradient_whatever_the_batch_holds(
    present: tuple[int, ...], capacity: int | None, tied: bool
) -> None:
    model = UnifiedTransformer(tiny_config(tie_text_embeddings=tied, loss_chunk_tokens=16, z_loss_weight=1e-4))
    batch = PackedBatch.from_sequences(random_rows([[9, 14], [30]], modalities=present), capacity=capacity)
    output = model.loss(batch)
    output.total.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    for index, modality in enumerate(MODALITIES):
        if index not in present:
            assert output.counts[modality] == 0
            assert float(output.sums[modality]) == 0
            weight = model.embeddings[modality].weight
            assert not weight.grad.any() or (tied and modality == "text")


def test_a_batch_without_any_target_has_loss_zero() -> None:
    model = UnifiedTransformer(tiny_config())
    output = model.loss(PackedBatch.from_sequences(random_rows([[1, 1]])))
    output.total.backward()
    assert output.total.item() == 0
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_default_normalisation_is_the_mean_over_all_targets() -> None:
    model = UnifiedTransformer(tiny_config())
    batch = PackedBatch.from_sequences(random_rows([[20, 12]]))
    output = model.loss(batch)
    assert isinstance(output, LossOutput)
    total, count = sum(float(s) for s in output.sums.values()), sum(output.counts.values())
    assert output.total.item() == pytest.approx(total / count, rel=1e-6)
    assert count == 30


def test_accumulated_micro_batches_sum_to_the_whole_step() -> None:
    model = UnifiedTransformer(tiny_config(z_loss_weight=0.01)).double()
    rows = random_rows([[20, 12], [32], [5, 27]])
    weights = {"audio": 0.25}
    whole = model.loss(PackedBatch.from_sequences(rows), weights=weights)
    whole_gradients = torch.autograd.grad(whole.total, list(model.parameters()))
    for as_tensor in (False, True):
        denominators = {n: torch.tensor(c) if as_tensor else c for n, c in whole.counts.items()}
        model.zero_grad()
        for row in rows:
            part = model.loss(PackedBatch.from_sequences([row]), weights=weights, denominators=denominators)
            part.total.backward()
        for parameter, expected in zip(model.parameters(), whole_gradients, strict=True):
            torch.testing.assert_close(parameter.grad, expected, atol=1e-12, rtol=0)


def test_an_unknown_modality_in_the_weights_is_refused() -> None:
    model = UnifiedTransformer(tiny_config())
    batch = PackedBatch.from_sequences(random_rows([[5]]))
    with pytest.raises(ValueError, match=r"weights name \['video'\]"):
        model.loss(batch, weights={"video": 1.0})
    with pytest.raises(ValueError, match=r"denominators \['text'\].*must give all"):
        model.loss(batch, denominators={"text": 1})


def test_initial_weights_follow_the_stated_scheme() -> None:
    config = tiny_config(hidden_size=128, num_layers=8, ffn_hidden_size=256, tie_text_embeddings=False, qk_norm=True)
    std = math.sqrt(2 / (5 * 128))
    for name, parameter in UnifiedTransformer(config, seed=0).named_parameters():
        if "norm" in name:
            assert (parameter == 1).all(), name
            continue
        residual = name.endswith("output.weight")
        expected = std / math.sqrt(2 * 8) if residual else std
        tolerance = 5 * expected / math.sqrt(2 * parameter.numel())
        assert parameter.std().item() == pytest.approx(expected, abs=tolerance), name
        assert abs(parameter.mean().item()) < 5 * expected / math.sqrt(parameter.numel()), name
    gpt2 = UnifiedTransformer(tiny_config(initializer_std=0.02), seed=0)
    assert float(gpt2.blocks[0].attention.qkv.weight.detach().std()) == pytest.approx(0.02, rel=0.1)


def test_the_first_loss_is_near_the_logarithm_of_the_vocabulary() -> None:
    model = UnifiedTransformer(tiny_config(hidden_size=256), seed=0)
    output = model.loss(PackedBatch.from_sequences(random_rows([[64]] * 8)))
    for name, size in zip(MODALITIES, SIZES, strict=True):
        assert float(output.sums[name]) / output.counts[name] == pytest.approx(math.log(size) + 0.2, abs=0.25)


def test_equal_seeds_give_equal_weights_also_from_the_meta_device() -> None:
    config = tiny_config()
    with torch.device("meta"):
        late = UnifiedTransformer(config)
    late.to_empty(device="cpu")
    late.reset_parameters(seed=11)
    torch.manual_seed(11)
    drawn = UnifiedTransformer(config)
    torch.manual_seed(11)
    again, other = UnifiedTransformer(config), UnifiedTransformer(config)
    direct = UnifiedTransformer(config, seed=11)
    for name, value in direct.state_dict().items():
        assert torch.equal(value, late.state_dict()[name]), name
        assert torch.equal(drawn.state_dict()[name], again.state_dict()[name]), name
        assert "norm" in name or not torch.equal(again.state_dict()[name], other.state_dict()[name]), name


def test_initialization_reaches_through_wrappers() -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    wrapped, plain = UnifiedTransformer(tiny_config()), UnifiedTransformer(tiny_config(), seed=4)
    for i, block in enumerate(wrapped.blocks):
        wrapped.blocks[i] = checkpoint_wrapper(block)
    wrapped.reset_parameters(seed=4)
    for ours, theirs in zip(wrapped.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_checkpointing_a_block_from_outside_changes_no_gradient() -> None:
    config = tiny_config()
    block = TransformerBlock(config).double()
    x = torch.randn(2, 8, 32, dtype=torch.float64, requires_grad=True)
    plan = plan_attention(config, x)
    plain = torch.autograd.grad(block(x, plan).square().sum(), [x, *block.parameters()])
    again = torch.autograd.grad(
        checkpoint(block, x, plan, use_reentrant=False).square().sum(), [x, *block.parameters()]
    )
    for one, other in zip(plain, again, strict=True):
        assert torch.equal(one, other)


def test_blocks_compile_without_a_graph_break_and_without_compiling_again() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0)
    batches = [PackedBatch.from_sequences(random_rows([[9, 7]], seed), capacity=16) for seed in (0, 1)]
    plain = [model.loss(batch).total.item() for batch in batches]
    torch._dynamo.reset()
    compiled = CompileCounterWithBackend("aot_eager")
    for block in model.blocks:
        block.compile(backend=compiled, fullgraph=True)
    for batch, expected in zip(batches, plain, strict=True):
        output = model.loss(batch)
        output.total.backward()
        assert output.total.item() == pytest.approx(expected, rel=1e-5)
    assert compiled.frame_count <= len(model.blocks)
    torch._dynamo.reset()


def test_the_whole_model_compiles_without_a_graph_break() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0)
    batch = PackedBatch.from_sequences(random_rows([[9, 7]]))
    expected = model(batch.token_ids, batch.modality_ids), model.loss(batch).total
    torch._dynamo.reset()
    for ran_before in (True, False):
        if not ran_before:
            model = UnifiedTransformer(tiny_config(), seed=0)
        whole = torch.compile(model, backend="aot_eager", fullgraph=True)
        loss = torch.compile(model.loss, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(whole(batch.token_ids, batch.modality_ids), expected[0])
        torch.testing.assert_close(loss(batch).total, expected[1])
        assert model.attention_backend == "sdpa"
    torch._dynamo.reset()


def test_dropout_acts_in_training_alone() -> None:
    model = UnifiedTransformer(tiny_config(dropout=0.5))
    batch = PackedBatch.from_sequences(random_rows([[20]]))
    assert model.loss(batch).total.item() != model.loss(batch).total.item()
    model.eval()
    assert model.loss(batch).total.item() == model.loss(batch).total.item()


def test_feed_forward_keeps_the_shape() -> None:
    assert FeedForward(tiny_config())(torch.randn(2, 3, 32)).shape == (2, 3, 32)


def test_ids_out_of_range_are_named_with_their_place() -> None:
    model = UnifiedTransformer(tiny_config())
    ids, kinds = torch.zeros(2, 2, 4, dtype=torch.int64)
    kinds[1, 2] = 3
    with pytest.raises(TokenError, match=r"modality_ids\[1, 2\] is 3: the modalities are 0 \(text\), 1 \(image\)"):
        model(ids, kinds)
    kinds[1, 2], ids[1, 2] = 2, 17
    with pytest.raises(TokenError, match=r"token_ids\[1, 2\] is 17: audio ids lie in 0\.\.16"):
        model(ids, kinds)
    ids[1, 2] = -1
    with pytest.raises(TokenError, match=r"token_ids\[1, 2\] is -1"):
        model(ids, kinds)


def test_ids_may_have_any_integer_type() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0)
    ids, kinds = torch.arange(12).view(2, 6), torch.tensor([[0, 1, 2] * 2] * 2)
    expected = model.hidden_states(ids, kinds)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.uint16, torch.int32, torch.uint32):
        assert torch.equal(model.hidden_states(ids.to(dtype), kinds.to(dtype)), expected), dtype
        with pytest.raises(TokenError, match=r"token_ids\[0, 5\] is 99: audio ids lie in"):
            model(torch.full_like(ids, 99).where(ids == 5, ids % 12).to(dtype), kinds.to(dtype))


@pytest.mark.parametrize(
    ("token_ids", "modality_ids", "message"),
    [
        (torch.ones(2, 6).long(), torch.ones(2, 5).long(), r"token_ids is \(2, 6\) and modality_ids \(2, 5\): both"),
        (torch.ones(2, 6).long(), torch.ones(1, 6).long(), r"modality_ids \(1, 6\): both must be \[B, T\]"),
        (torch.ones(6).long(), torch.ones(6).long(), r"token_ids is \(6,\) and modality_ids \(6,\): both must be"),
        (torch.ones(2, 6), torch.ones(2, 6).long(), "token_ids is float32: ids are integers; convert it"),
        (torch.ones(2, 6).long(), torch.ones(2, 6).half(), "modality_ids is float16: ids are integers"),
        (torch.ones(2, 6).bool(), torch.ones(2, 6).long(), "token_ids is bool: ids are integers"),
    ],
)
def test_ids_of_a_wrong_shape_or_type_are_refused(
    token_ids: torch.Tensor, modality_ids: torch.Tensor, message: str
) -> None:
    model = UnifiedTransformer(tiny_config())
    with pytest.raises(TokenError, match=message):
        model(token_ids, modality_ids)
    with pytest.raises(TokenError, match=message):
        model.hidden_states(token_ids.to("meta"), modality_ids.to("meta"))


def test_a_row_longer_than_the_model_is_refused() -> None:
    model = UnifiedTransformer(tiny_config())
    ids = torch.zeros(1, 65, dtype=torch.int64)
    with pytest.raises(ValueError, match="a row has 65 tokens: the model is made for at most 64"):
        model(ids, ids)


def test_the_example_module_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from model.__main__ import main

    monkeypatch.setattr("sys.argv", ["model", "--size", "small"])
    main()
    printed = capsys.readouterr().out
    for expected in ("7,596,527,616 (7.60 B)", "51.3 GFLOP", "image_logits              (2, 128, 16384) bfloat16"):
        assert expected in printed
