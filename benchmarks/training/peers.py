"""What others do at the same dimensions, on the same GPU."""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks.training.records import config_of, device, median_ms, peak_gib, record, rows_of

PEERS = ("transformers GPT-NeoX",)


def time_peer(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """What a user would pick at these dimensions: float32 weights, autocast, every block recomputed, blocks compiled."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    ours = config_of(arguments)
    config = GPTNeoXConfig(
        vocab_size=ours.text_vocab_size, hidden_size=ours.hidden_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads, intermediate_size=ours.ffn_hidden_size, rotary_pct=1.0,
        max_position_embeddings=arguments.length, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    torch.set_default_device(device())
    model = GPTNeoXForCausalLM(config).train()
    torch.set_default_device("cpu")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not arguments.quick:
        for layer in model.gpt_neox.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(ours.text_vocab_size, (1, arguments.length), device=device())

    def micro_batch() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            model(input_ids=ids, labels=ids).loss.backward()

    def update() -> None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    micro_batch()
    update()
    each = median_ms(micro_batch, 4, warm=1)
    last = median_ms(update, 1, warm=0) if device().type == "cuda" else 0.0
    speed = rows_of(arguments) * arguments.length / (rows_of(arguments) * each + last) * 1e3
    record(
        arguments.out,
        "peers",
        option["peer"],
        tokens_per_s=round(speed),
        micro_batch_ms=round(each, 1),
        peak_gib=peak_gib(),
    )
