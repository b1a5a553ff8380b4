"""Decoding against the bandwidth of memory: `python -m benchmarks.generation`.

Random weights of the reference dimensions in bfloat16. The roof of a step is the time to read what it must read once, at the
bandwidth that a copy reaches in the same run: all blocks' weights, the head of images, and the keys and values held.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from benchmarks.training.records import SIZES, device, error_of, guarded, median_ms, peak_gib, record
from model import KeyValueCache, UnifiedTransformer, UnifiedTransformerConfig
from model.decode import DecodingStep, step_unavailable


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", default="8b", choices=SIZES)
    parser.add_argument("--batches", default="1,2,4,8,16,32,64")
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("generation.jsonl"))
    parser.add_argument("--quick", action="store_true")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.size, arguments.batches, arguments.prompt, arguments.tokens = "quick", "1,2", 32, 8
    arguments.out.unlink(missing_ok=True)
    say = lambda what, **values: record(arguments.out, "decode", what, **values)  # noqa: E731
    torch.set_grad_enabled(False)
    bandwidth = copy_bandwidth(1 << (20 if arguments.quick else 30))
    say("copy", tb_per_s=round(bandwidth / 1e12, 3), torch=torch.__version__)
    with guarded(say, "agreement"):
        agreement(say)
    length = arguments.prompt + arguments.tokens + 8
    config = UnifiedTransformerConfig.from_dict(SIZES[arguments.size] | {"max_sequence_length": max(length, 256)})
    model = random_model(config)
    for rows in map(int, arguments.batches.split(",")):
        with guarded(say, f"batch {rows}"):
            time_batch(say, arguments, model, rows, length, bandwidth)
    sweep(say, model, bandwidth) if device().type == "cuda" else None


def copy_bandwidth(size: int) -> float:
    """Bytes a second, read and written ones together, of a copy of so many bfloat16 numbers."""
    source = torch.randn(size, dtype=torch.bfloat16, device=device())
    target = torch.empty_like(source)
    return 4 * size / median_ms(lambda: target.copy_(source), 10) * 1e3


def random_model(config: UnifiedTransformerConfig) -> UnifiedTransformer:
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    dtype = torch.bfloat16 if device().type == "cuda" else torch.float32
    model = model.to(dtype).to_empty(device=device())
    for parameter in model.parameters():
        parameter.fill_(1) if parameter.ndim == 1 else parameter.normal_(0, 0.02)
    return model.eval()


def agreement(say) -> None:  # type: ignore[no-untyped-def]
    """A small model's step, eager and fast, against float64 on the CPU."""
    sizes: dict[str, Any] = {"hidden_size": 512, "num_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 2048}
    config = UnifiedTransformerConfig(**sizes, text_vocab_size=500, max_sequence_length=512, device="cpu")
    exact = UnifiedTransformer(config, seed=0).bfloat16().double().eval()
    here = UnifiedTransformer(config, seed=0).to(device(), torch.bfloat16).eval()
    for rows in (1, 3, 8):
        ids, kinds = torch.randint(500, (rows, 204)), torch.zeros(rows, 204, dtype=torch.int64)
        right = exact.hidden_states(ids, kinds)[:, -1]
        errors = {}
        for way in ("eager", "fast", "programmatic"):
            cache = KeyValueCache(config, rows, 300, device(), torch.bfloat16)
            here.prefill(ids[:, :200].to(device()), kinds[:, :200].to(device()), cache)
            if way != "eager" and (reason := step_unavailable(here, cache)):
                say("agreement", skipped=reason)
                break
            step = None if way == "eager" else DecodingStep(here, cache, programmatic=way == "programmatic")
            for t in range(200, 204):
                new = ids[:, t].to(device()), kinds[:, t].to(device())
                hidden = here.decode_step(*new, cache) if step is None else step(*new)
            errors[way] = error_of(hidden, right)
        say("agreement", rows=rows, errors_against_float64=errors)


def time_batch(say, arguments, model, rows: int, length: int, bandwidth: float) -> None:  # type: ignore[no-untyped-def]
    config, kind = model.config, model.final_norm.weight.dtype
    ids = torch.randint(config.image_vocab_size, (rows, arguments.prompt), device=device())
    kinds = torch.ones_like(ids)
    blocks = sum(p.numel() for p in model.blocks.parameters())
    weights = (blocks + model.head_weight("image").numel()) * kind.itemsize
    held = arguments.prompt + arguments.tokens / 2
    read = weights + 2 * config.num_layers * rows * held * config.hidden_size * kind.itemsize
    for way in ("eager", "fast", "programmatic"):
        cache = KeyValueCache(config, rows, length, device(), kind)

        def prefill(cache: KeyValueCache = cache) -> None:
            # Sixteen rows at a time would be no cache of this size, so time the whole batch.
            cache.reset()
            model.prefill(ids, kinds, cache)

        first = median_ms(prefill, 1, warm=1)
        if way != "eager" and (reason := step_unavailable(model, cache)):
            say("step", way=way, skipped=reason)
            continue
        step = None if way == "eager" else DecodingStep(model, cache, programmatic=way == "programmatic")
        token = ids[:, 0].contiguous()

        def one(step=step, cache=cache, token=token) -> None:  # type: ignore[no-untyped-def]
            new = token, kinds[:, 0]
            hidden = model.decode_step(*new, cache) if step is None else step(*new)
            noise = -torch.empty(rows, config.image_vocab_size, device=device()).exponential_().log()
            token.copy_((model.image_logits(hidden).float() + noise).argmax(-1))

        one()

        def many(one=one) -> None:  # type: ignore[no-untyped-def]
            for _ in range(arguments.tokens):
                one()

        ms = median_ms(many, 1, warm=0) / arguments.tokens
        roof = read / bandwidth * 1e3
        say(
            "step", way=way, rows=rows, first_token_ms=round(first, 1), ms=round(ms, 3), roof_ms=round(roof, 3),
            share_of_roof=round(roof / ms, 3), tokens_per_s=round(1e3 * rows / ms), peak_gib=peak_gib(),
        )  # fmt: skip
        del step, cache, prefill, one, many


def sweep(say, model, bandwidth: float) -> None:  # type: ignore[no-untyped-def]
    """GB/s of each product of a block for several cuts, each layer's own weights in turn so that no cache helps."""
    from model import triton_decode
    from model.triton_decode import Tiles

    cuts = [
        (m, k, w, s) for m, k in ((2, 2048), (4, 1024), (8, 512), (8, 1024), (16, 512)) for w in (4, 8) for s in (1, 4)
    ]
    for name, parts in {"qkv": ("attention", "qkv"), "out": ("attention", "output"), "in": ("feed_forward", "input"),
                        "down": ("feed_forward", "output")}.items():  # fmt: skip
        weights = [getattr(getattr(block, parts[0]), parts[1]).weight for block in model.blocks]
        M, K = weights[0].shape
        x = torch.randn(1, K, device=device(), dtype=weights[0].dtype)
        y, scale = x.new_empty(1, M), torch.ones_like(x[0]) if name in ("qkv", "in") else None
        found = {}
        for cut in cuts:

            def every(cut=cut, weights=weights, x=x, y=y, scale=scale, name=name) -> None:  # type: ignore[no-untyped-def]
                for weight in weights:
                    triton_decode.product(x, weight, y, Tiles(*cut), scale=scale, eps=1e-5, gelu=name == "in")

            every()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                every()
            found[str(cut)] = round(len(weights) * 2 * M * K / median_ms(graph.replay, 5) / 1e6)
        best = sorted(found.items(), key=lambda item: -item[1])
        say(
            "sweep",
            product=name,
            gb_per_s=dict(best[:6]),
            worst=best[-1],
            share_of_copy=round(best[0][1] * 1e9 / bandwidth, 3),
        )


if __name__ == "__main__":
    main()
