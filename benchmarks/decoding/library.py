"""transformers' `generate`: its GPT-NeoX, which with sequential residuals and no biases is our blocks, with our weights.

By its documentation fastest: SDPA, and a static cache, for which `generate` compiles the one-token pass
(`torch.compile(mode="reduce-overhead")`, its default). It takes the likeliest token, the least that it can do to choose one.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor

from benchmarks.decoding.workload import SMALL, config_for, prompts, random_model, slots_for, speaker, tell
from benchmarks.training.records import between, device, mark, synchronize
from model import KeyValueCache, UnifiedTransformer, UnifiedTransformerConfig

STEADY_FROM = 8
"""Tokens before the ones that are timed."""


def time_library(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Milliseconds a token with the cache that the option names: static (then compiled) or dynamic."""
    kind, say = option["cache"], speaker(arguments, "transformers")
    try:
        import transformers
    except ImportError as error:
        say(kind, skipped=f"not installed here: {error}")
        return
    same = tokens_equal(kind)
    say("agreement", cache=kind, **same)
    ours = config_for(arguments)
    source = random_model(ours)
    model = gpt_neox(source, slots_for(arguments))
    del source
    ids, _ = prompts(arguments, ours, 1)
    # A first call compiles; with the same length to come, so that its cache is as large.
    generate(model, ids, arguments.tokens, kind, stop_after=4)
    synchronize()
    began = mark()
    marks, _ = generate(model, ids, arguments.tokens, kind)
    synchronize()
    compiled = hasattr(model, "_compiled_call")
    # Its cache is new in every call, so the graphs of the first tokens are captured again.
    steady = marks[min(STEADY_FROM, len(marks) // 2) :]
    tell(
        say, arguments, f"{kind} cache", rows=1, ms=between(steady[0], steady[-1]) / (len(steady) - 1), tokens=len(marks) - 1,
        first_token_ms=round(between(began, marks[0]), 1), compiled=compiled, version=transformers.__version__,
    )  # fmt: skip


def generate(
    model: Any, ids: Tensor, tokens: int, cache: str, stop_after: int | None = None
) -> tuple[list[Any], Tensor]:
    """Continue ids [1, T]; a mark for each token as its logits are there, and the new ids."""
    from transformers import CompileConfig, LogitsProcessorList, StoppingCriteriaList

    marks: list[Any] = []

    def clock(ids: Tensor, scores: Tensor) -> Tensor:
        marks.append(mark())
        return scores

    def enough(ids: Tensor, scores: object, **more: object) -> Tensor:
        done = stop_after is not None and len(marks) >= stop_after
        return torch.full((ids.shape[0],), done, dtype=torch.bool, device=ids.device)

    settings: dict[str, Any] = {}
    if cache == "static":
        # On a CPU it compiles only when told to; that is for trying this out.
        compiling = CompileConfig()
        compiling._compile_all_devices = True  # type: ignore[assignment]
        settings = {"cache_implementation": "static", "compile_config": compiling}
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False,
        logits_processor=LogitsProcessorList([clock]), stopping_criteria=StoppingCriteriaList([enough]), **settings,
    )  # fmt: skip
    return marks, found[0, ids.shape[1] :]


def gpt_neox(source: Any, length: int) -> Any:
    """The same model: it continues pictures, so its embedding is that of picture codes and their modality."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    ours = source.config
    config = GPTNeoXConfig(
        vocab_size=ours.image_vocab_size, hidden_size=ours.hidden_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads, intermediate_size=ours.ffn_hidden_size,
        max_position_embeddings=length, layer_norm_eps=ours.layer_norm_eps, use_parallel_residual=False,
        attention_bias=False, bos_token_id=None, eos_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": ours.rope_theta, "partial_rotary_factor": 1.0},
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    weight = source.final_norm.weight
    with torch.device("meta"):
        model: Any = GPTNeoXForCausalLM(config)
    # Rotary frequencies are no weights: only a model that is built on its device has them.
    model = model.to(weight.dtype).to_empty(device=weight.device).eval()
    with torch.device(weight.device):
        model.gpt_neox.rotary_emb = type(model.gpt_neox.rotary_emb)(config)
    for parameter in model.parameters():
        parameter.zero_()
    base = model.gpt_neox
    base.embed_in.weight.copy_(source.embeddings["image"].weight + source.modality_embedding.weight[1])
    for theirs, block in zip(base.layers, source.blocks, strict=True):
        # Its queries, keys and values are head by head.
        qkv = block.attention.qkv.weight.view(3, ours.num_attention_heads, ours.head_size, -1)
        theirs.attention.query_key_value.weight.copy_(qkv.transpose(0, 1).reshape(3 * ours.hidden_size, -1))
        theirs.attention.dense.weight.copy_(block.attention.output.weight)
        theirs.input_layernorm.weight.copy_(block.attention_norm.weight)
        theirs.post_attention_layernorm.weight.copy_(block.feed_forward_norm.weight)
        theirs.mlp.dense_h_to_4h.weight.copy_(block.feed_forward.input.weight)
        theirs.mlp.dense_4h_to_h.weight.copy_(block.feed_forward.output.weight)
    base.final_layer_norm.weight.copy_(source.final_norm.weight)
    model.get_output_embeddings().weight.copy_(source.heads["image"].weight)
    return model


def tokens_equal(cache: str, new: int = 24) -> dict[str, Any]:
    """A small model in float64 on the CPU: how many of the likeliest tokens are ours, uncompiled."""
    model = UnifiedTransformer(UnifiedTransformerConfig(**SMALL), seed=0).double().eval()
    ids = torch.randint(300, (1, 20), generator=torch.Generator().manual_seed(0))
    held = KeyValueCache(model.config, 1, 60, dtype=torch.float64)
    logits = [model.image_logits(model.prefill(ids, torch.ones_like(ids), held))]
    for _ in range(new - 1):
        token = logits[-1].argmax(-1)
        logits.append(model.image_logits(model.decode_step(token, torch.ones_like(token), held)))
    right = torch.stack([each.argmax(-1)[0] for each in logits])
    theirs = gpt_neox(model, 60)
    theirs.generation_config.disable_compile = True
    _, found = generate(theirs, ids, new, cache)
    return {"tokens": new, "equal": int((found == right).sum()), "of": str(device())}
