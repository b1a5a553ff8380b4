"""Which attention kernel runs, that it says so, and that all of them agree."""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from model import AttentionBackendError, PackedBatch, UnifiedTransformer
from model.attention import BACKENDS, AttentionPlan, Backend, attend, plan_attention, select_backend, unusable
from tests.model.cases import random_rows, random_starts, tiny_config

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def test_the_running_backend_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = UnifiedTransformer(tiny_config())
    assert model.attention_backend is None, "nothing has run"
    batch = PackedBatch.from_sequences(random_rows([[9]]))
    with caplog.at_level(logging.INFO, logger="model"):
        model.loss(batch)
        model.loss(batch)
    assert [record.getMessage() for record in caplog.records] == ["attention backend: sdpa, blocks: torch"]
    assert model.attention_backend == "sdpa"


@pytest.mark.parametrize("choice", ["auto", "flash_attn"])
def test_the_backend_to_come_follows_the_compute_type_rather_than_the_weights(
    choice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    in_bf16 = Backend(
        lambda device, dtype, head_size: None if dtype == torch.bfloat16 else f"it computes in bfloat16, not {dtype}",
        BACKENDS["sdpa"].attend,
        packed=False,
    )
    monkeypatch.setitem(BACKENDS, "flash_attn", in_bf16)
    model, cpu = UnifiedTransformer(tiny_config(attention_backend=choice)), torch.device("cpu")
    assert model.modality_embedding.weight.dtype == torch.float32
    assert model.attention_backend is None
    assert model.attention_backend_for(cpu, torch.bfloat16) == "flash_attn"
    if choice == "auto":
        assert model.attention_backend_for(cpu, torch.float32) == "sdpa"
    else:
        with pytest.raises(AttentionBackendError, match="attention_backend is 'flash_attn', but it computes in bf"):
            model.attention_backend_for(cpu, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model.loss(PackedBatch.from_sequences(random_rows([[9]])))
    assert model.attention_backend == "flash_attn"


@pytest.mark.parametrize("name", ["flash_attn", "varlen"])
def test_a_forced_backend_that_cannot_run_is_an_error_with_the_reason(name: str) -> None:
    model = UnifiedTransformer(tiny_config(attention_backend=name))
    batch = PackedBatch.from_sequences(random_rows([[9]]))
    with pytest.raises(AttentionBackendError, match=f"attention_backend is '{name}', but .*; set it to 'auto'"):
        model.loss(batch)
    with pytest.raises(AttentionBackendError, match="it needs a CUDA device and this is cpu"):
        select_backend(tiny_config(attention_backend="varlen"), torch.device("cpu"), torch.bfloat16)


def test_flash_attention_off_means_sdpa() -> None:
    config = tiny_config(use_flash_attention=False)
    assert select_backend(config, torch.device("cuda"), torch.bfloat16) == "sdpa"
    assert select_backend(tiny_config(attention_backend="sdpa"), torch.device("cuda"), torch.bfloat16) == "sdpa"


def test_packed_kernels_get_the_document_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    plans: list[AttentionPlan] = []
    monkeypatch.setitem(BACKENDS, "sdpa", replace(BACKENDS["sdpa"], packed=True))
    x = torch.randn(2, 6, 32)
    plans.append(plan_attention(tiny_config(), x))
    assert plans[0].cu_seqlens is not None
    assert plans[0].cu_seqlens.tolist() == [0, 6, 12]
    assert plans[0].max_seqlen == 6
    starts = torch.tensor([0, 2, 6, 12, 12], dtype=torch.int32)
    plan = plan_attention(tiny_config(), x, cu_seqlens=starts, max_seqlen=6)
    assert plan.cu_seqlens is starts
    assert plan.positions.tolist() == [[0, 1, 0, 1, 2, 3], [0, 1, 2, 3, 4, 5]]


@pytest.fixture
def path_of_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where packages named `flash_attn` are found; on a GPU that runs them."""

    def forget() -> None:
        unusable.cache_clear()
        for name in [name for name in sys.modules if name.partition(".")[0] == "flash_attn"]:
            del sys.modules[name]

    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    forget()
    yield tmp_path
    forget()


def _reason(name: str) -> str | None:
    return BACKENDS[name].unavailable(torch.device("cuda"), torch.bfloat16, 64)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    importlib.invalidate_caches()


@pytest.mark.parametrize("installed", [False, True])
def test_a_package_that_was_built_for_another_torch_is_no_backend_and_is_told(
    installed: bool, path_of_packages: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _write(path_of_packages / "flash_attn/__init__.py", "raise ImportError('undefined symbol: _ZTIN3c105ErrorE')")
    if installed:
        _write(path_of_packages / "flash_attn-2.8.3.dist-info/METADATA", "Name: flash-attn\nVersion: 2.8.3")
    told = (
        "the package flash-attn cannot be imported (ImportError: undefined symbol: _ZTIN3c105ErrorE); "
        "install it for torch 2"
    )
    assert (_reason("flash_attn") or "").startswith(told)
    assert "flash-attn-4 cannot be imported" in (_reason("flash_attn_4") or "")
    assert [record.getMessage().startswith(told) for record in caplog.records] == [True] * installed
    assert select_backend(tiny_config(), torch.device("cuda"), torch.bfloat16) in ("varlen", "sdpa")


def test_the_early_module_that_flash_attn_brings_is_not_taken_for_flash_attn_4(path_of_packages: Path) -> None:
    function = "def flash_attn_varlen_func(q, k, v, cu_seqlens_q, {}causal=False): ..."
    _write(path_of_packages / "flash_attn/__init__.py", "")
    _write(path_of_packages / "flash_attn/flash_attn_interface.py", function.format("max_seqlen_q, "))
    _write(path_of_packages / "flash_attn/cute/__init__.py", function.format(""))
    assert _reason("flash_attn") is None
    assert (_reason("flash_attn_4") or "").startswith("flash_attn.cute takes no max_seqlen_q, so it is not the package")


@pytest.mark.parametrize("code", ["", "raise RuntimeError('registered twice')", "flash_attn_varlen_func = print"])
def test_a_package_that_fails_in_any_way_is_passed_by(code: str, path_of_packages: Path) -> None:
    _write(path_of_packages / "flash_attn/cute/__init__.py", code)
    assert _reason("flash_attn_4")
    assert select_backend(tiny_config(), torch.device("cuda"), torch.bfloat16) in ("varlen", "sdpa")


def test_a_compiled_model_can_ask_for_the_backend(path_of_packages: Path) -> None:
    _write(path_of_packages / "flash_attn/__init__.py", "")
    _write(path_of_packages / "flash_attn/flash_attn_interface.py", "def flash_attn_varlen_func(q, max_seqlen_q): ...")

    @torch.compile(fullgraph=True, backend="eager")
    def asks(x: torch.Tensor) -> torch.Tensor:
        return x + (unusable("flash-attn", "flash_attn.flash_attn_interface", "pip install flash-attn") is None)

    assert asks(torch.zeros(2)).tolist() == [1, 1]


def test_flash_attn_4_alone_is_not_taken_for_flash_attn(path_of_packages: Path) -> None:
    assert _reason("flash_attn_4") == "the package flash-attn-4 is not installed (pip install --pre flash-attn-4)"
    unusable.cache_clear()
    _write(path_of_packages / "flash_attn/cute/__init__.py", "def flash_attn_varlen_func(q, max_seqlen_q): ...")
    assert _reason("flash_attn_4") is None
    assert _reason("flash_attn") == "the package flash-attn is not installed (pip install flash-attn)"


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("head_size", [64, 128])
@pytest.mark.parametrize("name", list(BACKENDS))
def test_each_backend_agrees_with_float64_forward_and_backward(name: str, head_size: int, seed: int) -> None:
    device = torch.device("cuda")
    reason = BACKENDS[name].unavailable(device, torch.bfloat16, head_size)
    if reason is not None:
        pytest.skip(reason)
    # All numbers are drawn on the CPU, so that every device sees the same ones.
    generator = torch.Generator().manual_seed(seed)
    rows = int(torch.randint(1, 4, (), generator=generator))
    length = int(torch.randint(100, 300, (), generator=generator))
    starts = random_starts(rows, length, generator).to(device)
    q, k, v, gradient = (
        torch.randn(rows, length, 4, head_size, generator=generator).to(device, torch.bfloat16) for _ in range(4)
    )
    results = []
    for backend, dtype in ((name, torch.bfloat16), ("sdpa", torch.float64)):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        plan = plan_attention(
            tiny_config(hidden_size=4 * head_size, num_attention_heads=4, attention_backend=backend),
            torch.empty(rows, length, 4 * head_size, device=device, dtype=dtype),
            cu_seqlens=starts,
            max_seqlen=length,
        )
        out = attend(*leaves, plan)
        results.append([out, *torch.autograd.grad(out, leaves, gradient.to(dtype))])
    for ours, exact in zip(*results, strict=True):
        error = (ours.double() - exact).norm() / exact.norm()
        assert float(error) < 0.01


@needs_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("name", list(BACKENDS))
def test_the_loss_on_a_gpu_agrees_with_the_cpu(name: str) -> None:
    config = tiny_config(hidden_size=256, attention_backend=name, device="cuda")
    reason = BACKENDS[name].unavailable(torch.device("cuda"), torch.bfloat16, config.head_size)
    if reason is not None:
        pytest.skip(reason)
    batch = PackedBatch.from_sequences(random_rows([[20, 30], [64]]), length=64, capacity=128, max_documents=8)
    exact = UnifiedTransformer(tiny_config(hidden_size=256), seed=0)
    model = UnifiedTransformer(config, seed=0)
    model.load_state_dict(exact.state_dict())
    model.to(config.device)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = model.loss(batch.to(config.device))
    output.total.backward()
    assert model.attention_backend == name
    assert output.total.item() == pytest.approx(float(exact.loss(batch).total), rel=0.01)
