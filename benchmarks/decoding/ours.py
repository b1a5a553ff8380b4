"""Our own decoding: the step, eager, captured, and captured with programmatic launch; and the prompts before it."""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.workload import (
    cache_for,
    config_for,
    drawn,
    prompts,
    random_model,
    slots_for,
    speaker,
    tell,
)
from benchmarks.training.records import between, device, error_of, guarded, mark, median_ms, peak_gib, synchronize
from model import KeyValueCache, UnifiedTransformer, UnifiedTransformerConfig
from model.decode import DecodingStep, step_unavailable

EAGER_TOKENS = 16
"""Launching from Python takes as long for every token, so a few say it."""


def check(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """A small model's step, eager and captured, against float64 on the CPU."""
    say = speaker(arguments, "check")
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


def time_ours(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Milliseconds a token of each way, behind prompts of one length."""
    say, rows = speaker(arguments, "ours"), option["rows"]
    model = random_model(config_for(arguments))
    ids, kinds = prompts(arguments, model.config, rows)
    cache = cache_for(model, rows, slots_for(arguments))

    def prefill() -> None:
        cache.reset()
        model.prefill(ids, kinds, cache)

    first = median_ms(prefill, 1, warm=1)
    for way in arguments.ways.split(","):
        cache.lengths.fill_(arguments.prompt)
        cache.occupied = arguments.prompt
        with guarded(say, way):
            if way != "eager" and (reason := step_unavailable(model, cache)):
                say(way, rows=rows, skipped=reason)
                continue
            tokens = min(arguments.tokens, EAGER_TOKENS) if way == "eager" else arguments.tokens
            ms = _ms_a_token(model, cache, ids[:, 0].contiguous(), way, tokens)
            tell(say, arguments, way, rows=rows, ms=ms, tokens=tokens, first_token_ms=round(first, 1))


def _ms_a_token(model: UnifiedTransformer, cache: KeyValueCache, token: Tensor, way: str, tokens: int) -> float:
    step = None if way == "eager" else DecodingStep(model, cache, programmatic=way == "programmatic")
    kind = torch.ones_like(token)

    def one() -> None:
        hidden = model.decode_step(token, kind, cache) if step is None else step(token, kind)
        token.copy_(drawn(model.image_logits(hidden)))

    one()
    synchronize()
    began = mark()
    for _ in range(tokens):
        one()
    ended = mark()
    synchronize()
    return between(began, ended) / tokens


def time_prompts(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Milliseconds to read prompts, of one length or of many: as `prefill` does, and under a dense mask over padded rows."""
    say, rows = speaker(arguments, "prompts"), option["rows"]
    model = random_model(config_for(arguments))
    ids, kinds = prompts(arguments, model.config, rows)
    cache = cache_for(model, rows, slots_for(arguments))
    T = arguments.prompt
    spread = torch.linspace(1, T, rows).round().long() if rows > 1 else torch.tensor([T])
    for name, counts in {"equal": torch.full((rows,), T), "ragged": spread}.items():
        lengths = counts.to(device())
        last = torch.arange(rows, device=device()), lengths - 1
        found: dict[str, Tensor] = {}

        def dense(found: dict[str, Tensor] = found, last: tuple[Tensor, Tensor] = last) -> None:
            cache.reset()
            found["dense"] = model.hidden_states(ids, kinds, cache=cache)[last]

        def grouped(found: dict[str, Tensor] = found, lengths: Tensor = lengths) -> None:
            cache.reset()
            found["prefill"] = model.prefill(ids, kinds, cache, lengths)

        times: dict[str, float] = {}
        for way, run in {"prefill": grouped, "dense": dense}.items():
            with guarded(say, f"{name}, {way}"):
                times[way] = median_ms(run, 2, warm=1)
        difference = error_of(found["prefill"], found["dense"]) if len(found) == 2 else None
        say(
            name, rows=rows, tokens=int(counts.sum()), ms={way: round(ms, 1) for way, ms in times.items()},
            attention=model.attention_backend_for(device(), model.final_norm.weight.dtype), difference=difference,
            peak_gib=peak_gib(),
        )  # fmt: skip
