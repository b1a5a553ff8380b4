"""Two ranks under FSDP2, one with image targets alone and one with audio alone, do what one process does."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from model import MODALITIES, PackedBatch, UnifiedTransformer
from tests.model.cases import random_rows, tiny_config

SEED = 5
STEPS = 20
DISJOINT = ((1,), (2,))


def batch_of(rank: int, step: int) -> PackedBatch:
    rows = random_rows([[13, 7], [20]], seed=10 * step + rank, modalities=DISJOINT[rank])
    return PackedBatch.from_sequences(rows, capacity=40)


def denominators_of(step: int) -> dict[str, int]:
    return {name: sum(batch_of(rank, step).targets[name].count for rank in (0, 1)) for name in MODALITIES}


def train_one_process(dtype: torch.dtype) -> UnifiedTransformer:
    model = UnifiedTransformer(tiny_config(), seed=SEED).to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
    for step in range(STEPS):
        for rank in (0, 1):
            model.loss(batch_of(rank, step), denominators=denominators_of(step)).total.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def train_sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    results: dict[str, object] = {}
    lean = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    for name, policy in {"float32": MixedPrecisionPolicy(), "fused": MixedPrecisionPolicy(), "bfloat16": lean}.items():
        with torch.device("meta"):
            model = UnifiedTransformer(tiny_config(block_backend="fused" if name == "fused" else "torch"))
        for block in model.blocks:
            fully_shard(block, mp_policy=policy)
        fully_shard(model, mp_policy=policy)
        for method in ("loss", "token_losses", "hidden_states"):
            register_fsdp_forward_method(model, method)
        model.to_empty(device="cpu")
        model.reset_parameters(seed=SEED)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3)
        with torch.no_grad():
            losses = model.token_losses(batch_of(rank, 0))
        results[f"{name} losses {rank}"] = losses
        for step in range(STEPS):
            output = model.loss(batch_of(rank, step), denominators=denominators_of(step))
            # The loss wants gradients summed over ranks, and FSDP2 averages them.
            (output.total * 2).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        results[name] = {key: value.full_tensor() for key, value in model.state_dict().items()}
    torch.save(results, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_with_disjoint_modalities_equal_one_process(tmp_path: Path) -> None:
    mp.spawn(train_sharded, args=(str(tmp_path),), nprocs=2)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    expected = train_one_process(torch.float32).state_dict()
    initial = UnifiedTransformer(tiny_config(), seed=SEED)
    for rank in (0, 1):
        single = initial.token_losses(batch_of(rank, 0))
        for name in MODALITIES:
            torch.testing.assert_close(ranks[rank][f"float32 losses {rank}"][name], single[name].detach())
    for key, value in expected.items():
        for name in ("float32", "fused"):
            torch.testing.assert_close(ranks[0][name][key], value, atol=1e-5, rtol=1e-5, msg=f"{name} {key}")
            assert torch.equal(ranks[0][name][key], ranks[1][name][key])
        torch.testing.assert_close(ranks[0]["bfloat16"][key], value, atol=2e-2, rtol=0, msg=key)
