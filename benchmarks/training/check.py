"""One model in float64 on the CPU, against the same weights as they run here."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.packed_workload import make_steps
from benchmarks.training.records import device, error_of, guarded, record
from model import UnifiedTransformer, UnifiedTransformerConfig
from model.attention import BACKENDS


def check(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """One model in float64 on the CPU, and the same weights as they run here."""
    from pipelines.pretrain.master_adamw import MasterAdamW

    say = lambda what, **values: record(arguments.out, "check", what, **values)  # noqa: E731
    say("machine", torch=torch.__version__, device=torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu")
    sizes = {"hidden_size": 512, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 2048}
    sizes |= {"text_vocab_size": 5257, "image_vocab_size": 1024, "audio_vocab_size": 264, "z_loss_weight": 1e-3}
    if arguments.quick:
        sizes |= {"hidden_size": 64, "num_attention_heads": 2, "ffn_hidden_size": 128, "text_vocab_size": 157}
    config = UnifiedTransformerConfig(**sizes, max_sequence_length=512, device="cpu", loss_chunk_tokens=300)
    batch = make_steps(config, steps=1, sequences=2, micro_batch=2, length=512)[0].micro_batches[0]
    exact = UnifiedTransformer(config, seed=0).bfloat16().double()
    exact.loss(batch).total.backward()
    expected = {name: parameter.grad for name, parameter in exact.named_parameters()}
    here = batch.to(device())
    dtype = torch.bfloat16
    name = option["backend"]
    if reason := BACKENDS[name].unavailable(device(), dtype, config.head_size):
        say(f"model with {name}", skipped=reason)
    else:
        for blocks in ("torch", "fused"):
            for accumulate in (False, True):
                with guarded(say, f"model with {name}, blocks {blocks}"):
                    settings = config.to_dict() | {"attention_backend": name, "block_backend": blocks}
                    model = UnifiedTransformer(UnifiedTransformerConfig.from_dict(settings), seed=0)
                    model = model.to(device(), dtype)
                    if accumulate:
                        MasterAdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), eps=1e-8, accumulate=True)
                    output = model.loss(here)
                    output.total.backward()
                    errors = {n: error_of(p.grad, expected[n]) for n, p in model.named_parameters()}
                    worst = max(errors, key=lambda n: errors[n])
                    kinds = {str(p.grad.dtype) for p in model.parameters()}
                    say(
                        f"model with {name}, blocks {blocks}, accumulate {accumulate}",
                        loss=float(output.total),
                        loss_error=abs(float(output.total) - float(exact.loss(batch).total)),
                        worst_gradient=[worst, errors[worst]],
                        median_gradient=statistics.median(errors.values()),
                        grads=sorted(kinds),
                    )
    if name == "sdpa" and device().type == "cuda":
        with guarded(say, "model with sdpa by cuDNN"):
            check_cudnn(say, config, here, expected)
    if name != ("varlen" if device().type == "cuda" else "sdpa"):
        return
    with guarded(say, "float8"):
        check_float8(say, config, here, expected)
    with guarded(say, "optimizer"):
        check_optimizer(say)


def check_cudnn(
    say: Callable[..., None], config: UnifiedTransformerConfig, batch: Any, expected: dict[str, Any]
) -> None:
    """Gradients with cuDNN's attention under the documents' mask, plain blocks; torch refuses where it cannot run."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    values = config.to_dict() | {"block_backend": "torch", "attention_backend": "sdpa"}
    model = UnifiedTransformer(UnifiedTransformerConfig.from_dict(values), seed=0).to(device(), torch.bfloat16)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        say_gradients(say, "sdpa by cuDNN", model, batch, expected)


def say_gradients(
    say: Callable[..., None], what: str, model: UnifiedTransformer, batch: Any, expected: dict[str, Any]
) -> None:
    """The loss, and how far the gradients are from the reference."""
    output = model.loss(batch)
    output.total.backward()
    errors = {n: error_of(p.grad, expected[n]) for n, p in model.named_parameters()}
    say(
        what,
        loss=float(output.total),
        median_gradient=statistics.median(errors.values()),
        worst=max(errors.values()),
    )


def check_float8(
    say: Callable[..., None], config: UnifiedTransformerConfig, batch: Any, expected: dict[str, Any]
) -> None:
    """Gradients in float8 against the same reference: three to four bits, so errors of some percent are right."""
    from model import float8

    x = torch.randn(300, 1000, device=device()).bfloat16() * 3
    for turn in (False, True):
        cast, scale = float8.quantize(x, float8.E4M3, transpose=turn)
        plain = (x.float() / scale).clamp(-448, 448).to(float8.E4M3)
        differ = float(((plain.T if turn else plain).float() != cast.float()).float().mean())
        say(f"float8 cast, turned {turn}", share_that_differs=differ)
    attention = "varlen" if device().type == "cuda" else "sdpa"
    values = config.to_dict() | {"block_backend": "fused", "attention_backend": attention}
    model = UnifiedTransformer(UnifiedTransformerConfig.from_dict(values), seed=0).to(device(), torch.bfloat16)
    for block in model.blocks:
        block.float8 = True  # type: ignore[assignment]
    say_gradients(say, "float8", model, batch, expected)


def check_optimizer(say: Callable[..., None]) -> None:
    from pipelines.pretrain.master_adamw import MasterAdamW

    weight = torch.nn.Parameter(torch.randn(300, 1000, device=device()).bfloat16())
    twin = torch.nn.Parameter(weight.detach().double().cpu())
    settings: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}
    ours = MasterAdamW([weight], accumulate=True, **settings)
    theirs = torch.optim.AdamW([twin], **settings)
    for _ in range(10):
        gradient = torch.randn(300, 1000)
        weight.grad.copy_(gradient)  # type: ignore[union-attr]
        twin.grad = gradient.double()
        ours.step()
        theirs.step()
    moved = error_of(next(iter(ours.masters().values())), twin.detach())
    say("optimizer, 10 steps", master_error=moved, weight_error=error_of(weight.detach(), twin.detach()))
