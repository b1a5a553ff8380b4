"""What others do at the same dimensions, on the same GPU, by their best documented settings.

Each has float32 weights that are rounded for the products, one head, rows without documents; blocks compiled and computed
again in the backward pass, without which 7.6 B parameters do not fit. A peer that is not installed is said to be missing. To
carry as wheels, with --no-deps (torch 2.11, Python 3.12):

    litgpt      litgpt 0.5.13, lightning 2.6.6, lightning-fabric 2.6.6, pytorch-lightning 2.6.6, lightning-utilities 0.15.3,
                torchmetrics 1.9.0, jsonargparse 4.53.0, docstring-parser 0.18.0, typeguard 4.6.1, psutil
    torchtitan  torchtitan 0.2.2 (0.3 has other names, and needs spmd-types 0.2.3), torchdata 0.11.0, einops 0.8.2,
                tyro 1.0.17, docstring-parser, typeguard; it imports Triton

Their vocabulary is the text one, padded to a multiple of 128, as litgpt pads (to 512) and transformers advises: at an odd
size, such as 50,257, cuBLAS has only slow kernels (docs/decisions/0013). torchtitan's block is Llama's: its feed-forward part
has three matrices, whose size is set so that it multiplies as much.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks.training.records import config_of, device, median_ms, peak_gib, record, rows_of
from model import UnifiedTransformerConfig

Peer = tuple[nn.Module, Callable[[Tensor], Tensor]]
"""A model, and its loss on token ids [1, T]."""


def time_peer(arguments: argparse.Namespace, option: dict[str, Any]) -> None:
    """Speed of one peer from a few micro-batches; the optimizer's time counts once in 262,144 tokens."""
    name = option["peer"]
    ours = config_of(arguments)
    try:
        model, loss = PEERS[name](ours, arguments.length, not arguments.quick)
    except ImportError as error:
        record(arguments.out, "peers", name, skipped=f"not installed here: {error}")
        return
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    ids = torch.randint(ours.text_vocab_size, (1, arguments.length), device=device())

    def micro_batch() -> None:
        with torch.autocast(device().type, dtype=torch.bfloat16):
            loss(ids).backward()

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
        name,
        tokens_per_s=round(speed),
        micro_batch_ms=round(each, 1),
        peak_gib=peak_gib(),
        parameters=sum(p.numel() for p in model.parameters()),
    )


def gpt_neox(ours: UnifiedTransformerConfig, length: int, compiled: bool) -> Peer:
    """transformers' model with the same blocks as ours."""
    from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

    config = GPTNeoXConfig(
        vocab_size=padded(ours.text_vocab_size), hidden_size=ours.hidden_size, num_hidden_layers=ours.num_layers,
        num_attention_heads=ours.num_attention_heads, intermediate_size=ours.ffn_hidden_size, rotary_pct=1.0,
        max_position_embeddings=length, use_cache=False,
    )  # fmt: skip
    config._attn_implementation = "sdpa"
    with torch.device(device()):
        model = GPTNeoXForCausalLM(config).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if compiled:
        for layer in model.gpt_neox.layers:
            layer.compile()
    return model, lambda ids: model(input_ids=ids, labels=ids).loss


def litgpt(ours: UnifiedTransformerConfig, length: int, compiled: bool) -> Peer:
    """litgpt's GPT with the same blocks as ours."""
    from litgpt.config import Config
    from litgpt.model import GPT

    config = Config(
        block_size=length, n_layer=ours.num_layers, n_embd=ours.hidden_size, n_head=ours.num_attention_heads, bias=False,
        vocab_size=ours.text_vocab_size, padded_vocab_size=padded(ours.text_vocab_size), rotary_percentage=1.0,
        intermediate_size=ours.ffn_hidden_size, parallel_residual=False,
    )  # fmt: skip
    with torch.device(device()):
        model = GPT(config).train()
    _recompute(list(model.transformer.h), compiled)
    return model, lambda ids: _next_token_loss(model(ids), ids)


def torchtitan(ours: UnifiedTransformerConfig, length: int, compiled: bool) -> Peer:
    """torchtitan's Llama 3 with as many parameters a block as ours."""
    from torchtitan.models.llama3.model.args import TransformerModelArgs
    from torchtitan.models.llama3.model.model import Transformer

    # It takes two thirds of four times the width, times this: ours has two matrices, it has three.
    share = ours.ffn_hidden_size / (4 * ours.hidden_size)
    args = TransformerModelArgs(
        dim=ours.hidden_size, n_layers=ours.num_layers, n_heads=ours.num_attention_heads, max_seq_len=length,
        vocab_size=padded(ours.text_vocab_size), ffn_dim_multiplier=share, multiple_of=min(256, ours.hidden_size),
    )  # fmt: skip
    with torch.device(device()):
        model = Transformer(args).train()
        with torch.no_grad():
            model.init_weights()
    _recompute(list(model.layers.values()), compiled)
    return model, lambda ids: _next_token_loss(model(ids), ids)


def padded(vocabulary: int) -> int:
    return -(-vocabulary // 128) * 128


def _recompute(blocks: list[nn.Module], compiled: bool) -> None:
    """Each block is computed again in the backward pass, and compiled."""
    for block in blocks:
        forward = torch.compile(block.forward) if compiled else block.forward
        block.forward = _again(forward)  # type: ignore[method-assign]


def _again(forward: Callable[..., Any]) -> Callable[..., Any]:
    def call(*inputs: Any, **more: Any) -> Any:
        return checkpoint(forward, *inputs, use_reentrant=False, **more)

    return call


def _next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


PEERS: dict[str, Callable[[UnifiedTransformerConfig, int, bool], Peer]] = {
    "transformers GPT-NeoX": gpt_neox,
    "litgpt GPT": litgpt,
    "torchtitan Llama 3": torchtitan,
}
