"""Packed documents do not see each other, and batches keep their contract."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model import IGNORE_INDEX, MODALITIES, BatchError, PackedBatch, UnifiedTransformer
from tests.model.cases import random_document, random_rows, tiny_config


def losses_by_place(model: UnifiedTransformer, batch: PackedBatch) -> dict[int, float]:
    """Flat position of the predicting token -> its loss."""
    losses = model.token_losses(batch)
    return {
        int(at): float(loss)
        for name in MODALITIES
        for at, loss in zip(
            batch.targets[name].positions[: batch.targets[name].count], losses[name].detach(), strict=False
        )
    }


@pytest.mark.parametrize("use_rope", [True, False])
def test_a_documents_loss_does_not_change_when_its_neighbour_does(use_rope: bool) -> None:
    model = UnifiedTransformer(tiny_config(use_rope=use_rope), seed=0).double()
    rows = random_rows([[6, 9, 5]])
    changed = [[random_rows([[6]], seed=9)[0][0], rows[0][1], random_rows([[5]], seed=8)[0][0]]]
    before, after = (losses_by_place(model, PackedBatch.from_sequences(r)) for r in (rows, changed))
    middle = range(6, 6 + 9 - 1)
    assert [before[t] for t in middle] == pytest.approx([after[t] for t in middle], abs=1e-12)
    assert before != after


def test_scores_are_the_losses_and_where_the_target_stands_among_all_tokens() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0).double()
    batch = PackedBatch.from_sequences(random_rows([[6, 9, 5], [12]]), capacity=40)
    scores, losses = model.token_scores(batch), model.token_losses(batch)
    hidden = model._predicting(batch).detach()
    for name in MODALITIES:
        targets = batch.targets[name]
        assert torch.equal(scores[name].losses, losses[name])
        p = torch.softmax(hidden[targets.positions] @ model.head_weight(name).detach().T, -1)
        for i in range(targets.count):
            order = torch.argsort(-p[i], stable=True).tolist()
            assert scores[name].ranks[i] == order.index(int(targets.ids[i]))
            assert float(scores[name].confidences[i]) == pytest.approx(float(p[i].max()))


def test_of_equal_logits_the_first_is_taken_for_the_likeliest() -> None:
    model = UnifiedTransformer(tiny_config(tie_text_embeddings=False), seed=0)
    torch.nn.init.zeros_(model.heads["text"].weight)  # type: ignore[arg-type]
    batch = PackedBatch.from_sequences(random_rows([[9, 9]]))
    targets = batch.targets["text"]
    assert targets.count
    assert torch.equal(model.token_scores(batch)["text"].ranks, targets.ids)


def test_no_gradient_crosses_a_document_boundary() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0).double()
    batch = PackedBatch.from_sequences(random_rows([[6, 9]]))
    seen: list[torch.Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: (args[0].retain_grad(), seen.append(args[0]))[0])
    hidden = model.hidden_states(batch.token_ids, torch.zeros_like(batch.modality_ids), cu_seqlens=batch.cu_seqlens)
    hidden[0, 6:].square().sum().backward()
    assert seen[0].grad is not None
    assert not seen[0].grad[0, :6].any()
    assert seen[0].grad[0, 6:].any(dim=-1).all()


@pytest.mark.parametrize("use_rope", [True, False])
def test_packed_equals_unpacked(use_rope: bool) -> None:
    model = UnifiedTransformer(tiny_config(use_rope=use_rope), seed=0).double()
    rows = random_rows([[7, 3, 10], [15, 2]])
    packed = losses_by_place(model, PackedBatch.from_sequences(rows, length=22))
    alone: dict[int, float] = {}
    for b, row in enumerate(rows):
        start = b * 22
        for document in row:
            single = losses_by_place(model, PackedBatch.from_sequences([[document]]))
            alone |= {start + t: loss for t, loss in single.items()}
            start += len(document[0])
    assert packed == pytest.approx(alone, abs=1e-12)


def test_positions_follow_from_document_starts() -> None:
    model = UnifiedTransformer(tiny_config(use_rope=False), seed=0).double()
    batch = PackedBatch.from_sequences(random_rows([[7, 3], [4, 4]]), length=12, max_documents=9)
    arguments = {"cu_seqlens": batch.cu_seqlens}
    explicit = model.hidden_states(batch.token_ids, batch.modality_ids, positions=batch.positions, **arguments)
    assert torch.equal(explicit, model.hidden_states(batch.token_ids, batch.modality_ids, **arguments))


def test_small_integer_types_serve_as_well() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0)
    batch = PackedBatch.from_sequences(random_rows([[7, 3]]))
    small = replace(
        batch,
        token_ids=batch.token_ids.int(),
        modality_ids=batch.modality_ids.to(torch.int8),
        positions=batch.positions.int(),
    )
    assert torch.equal(model.loss(batch).total, model.loss(small).total)


def test_one_document_a_row_runs_without_a_mask() -> None:
    model = UnifiedTransformer(tiny_config(), seed=0).double()
    ids, modalities = random_document(40, torch.Generator().manual_seed(1))
    ids, modalities = ids.view(2, 20), modalities.view(2, 20)
    batch = PackedBatch.from_tensors(ids, modalities)
    plain = model.hidden_states(ids, modalities)
    packed = model.hidden_states(ids, modalities, cu_seqlens=batch.cu_seqlens, max_seqlen=20)
    assert torch.equal(plain, packed)


@given(
    lengths=st.lists(st.lists(st.integers(1, 12), min_size=1, max_size=5), min_size=1, max_size=4),
    spare=st.integers(0, 5),
    seed=st.integers(0, 1000),
)
@settings(max_examples=50, deadline=None)
def test_batches_built_from_sequences_keep_their_contract(lengths: list[list[int]], spare: int, seed: int) -> None:
    rows = random_rows(lengths, seed)
    total = sum(map(sum, lengths))
    batch = PackedBatch.from_sequences(
        rows,
        length=max(map(sum, lengths)) + spare,
        capacity=total + spare,
        max_documents=sum(map(len, lengths)) + len(lengths) + spare,
    )
    batch.check()
    documents = sum(map(len, lengths))
    assert sum(target.count for target in batch.targets.values()) == total - documents
    flat_ids, flat_modalities = batch.token_ids.flatten(), batch.modality_ids.flatten()
    for index, name in enumerate(MODALITIES):
        target = batch.targets[name]
        at = target.positions[: target.count]
        assert torch.equal(flat_ids[at + 1], target.ids[: target.count])
        assert (flat_modalities[at + 1] == index).all()
        assert (batch.positions.flatten()[at + 1] == batch.positions.flatten()[at] + 1).all()
        assert (target.ids[target.count :] == IGNORE_INDEX).all()


def test_what_does_not_fit_is_refused_with_the_remedy() -> None:
    rows = random_rows([[6, 9]])
    with pytest.raises(BatchError, match=r"row 0 holds at least 15 tokens: length is 10"):
        PackedBatch.from_sequences(rows, length=10)
    with pytest.raises(BatchError, match="the capacity is 1; raise it"):
        PackedBatch.from_sequences(rows, capacity=1)
    with pytest.raises(BatchError, match="max_documents is 1; raise it"):
        PackedBatch.from_sequences(rows, max_documents=1)


def test_a_broken_batch_is_named() -> None:
    batch = PackedBatch.from_sequences(random_rows([[6, 9], [8]]))
    text = batch.targets["text"]
    broken = {
        "crosses the end of a row": replace(batch, cu_seqlens=torch.tensor([0, 6, 23, 30], dtype=torch.int32)),
        "descends": replace(batch, cu_seqlens=torch.tensor([0, 15, 6, 30], dtype=torch.int32)),
        "int32 from 0 to 30": replace(batch, cu_seqlens=torch.tensor([0, 15], dtype=torch.int32)),
        "max_seqlen is 3": replace(batch, max_seqlen=3),
        r"targets are given for \['text'\]: give text, image, audio": replace(batch, targets={"text": text}),
        r"targets\['text'\].count": replace(batch, targets={**batch.targets, "text": replace(text, count=0)}),
        "leave the range": replace(
            batch, targets={**batch.targets, "text": replace(text, positions=text.positions + 30)}
        ),
        "positions has shape": replace(batch, positions=batch.positions[:1]),
    }
    for message, wrong in broken.items():
        with pytest.raises(BatchError, match=message):
            wrong.check()


def test_moving_a_batch_keeps_it() -> None:
    batch = PackedBatch.from_sequences(random_rows([[6, 9]]))
    moved = batch.to("cpu", non_blocking=True)
    moved.check()
    assert torch.equal(moved.token_ids, batch.token_ids)
    assert batch.to("meta").targets["image"].ids.is_meta
