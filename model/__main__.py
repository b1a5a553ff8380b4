"""python -m model [--size auto|small|reference]

The reference example, runnable: build the model, call it, and take one training step in mixed precision. "auto" runs the
reference configuration as written where GPU memory allows, else small dimensions; the 7.60 B are counted in any case, on
the meta device, which holds shapes without memory.
"""

from __future__ import annotations

import argparse
import logging
import time

import torch

from model import PackedBatch, UnifiedTransformer, UnifiedTransformerConfig

SMALL = {"hidden_size": 128, "num_layers": 4, "num_attention_heads": 4, "ffn_hidden_size": 512}
BATCH, LENGTH = 2, 128

# A parameter costs 4 bytes as weight, 4 as gradient and 2 as the bfloat16 copy that autocast keeps for the backward pass.
BYTES_PER_PARAMETER = 10
ACTIVATION_BYTES = 6 * 2**30


def main() -> None:
    """Parse the command line and run the example."""
    parser = argparse.ArgumentParser(prog="python -m model", description="The reference example of the model.")
    parser.add_argument("--size", choices=("auto", "small", "reference"), default="auto")
    size = parser.parse_args().size
    logging.basicConfig(level=logging.WARNING)

    reference = UnifiedTransformerConfig(
        text_vocab_size=50257, image_vocab_size=16384, audio_vocab_size=1024, use_flash_attention=True, use_rope=True
    )
    count_reference(reference)
    if size == "auto":
        size = "reference" if fits(reference) else "small"
    config = reference if size == "reference" else UnifiedTransformerConfig.from_dict(SMALL)
    model = build(config, size)
    token_ids, modality_ids = random_tokens(config)
    call(model, token_ids, modality_ids)
    train_one_step(model, PackedBatch.from_tensors(token_ids, modality_ids).to(config.device))


def count_reference(config: UnifiedTransformerConfig) -> None:
    """Build the defaults on the meta device and print their size and cost."""
    with torch.device("meta"):
        model = UnifiedTransformer(config)
    full, causal = (config.flops_per_token(4096, convention) / 1e9 for convention in ("full", "causal"))
    title("Reference configuration, on the meta device")
    row("parameters", f"{model.num_parameters():,} ({model.num_parameters() / 1e9:.2f} B)")
    row("training, per token", f"{full:.1f} GFLOP at length 4096 ({causal:.1f} with the causal half)")


def fits(config: UnifiedTransformerConfig) -> bool:
    """Whether one mixed-precision step fits the free memory of the GPU, if there is one."""
    if config.device != "cuda":
        return False
    return torch.cuda.mem_get_info()[0] > config.num_parameters() * BYTES_PER_PARAMETER + ACTIVATION_BYTES


def build(config: UnifiedTransformerConfig, size: str) -> UnifiedTransformer:
    """Initialize the model where it will run, so that nothing large passes through host memory."""
    started = time.perf_counter()
    with torch.device(config.device):
        model = UnifiedTransformer(config, seed=0)
    title(f"Running: {size} dimensions on {config.device}")
    row("hidden x layers x heads", f"{config.hidden_size} x {config.num_layers} x {config.num_attention_heads}")
    row("parameters", f"{model.num_parameters():,} ({time.perf_counter() - started:.1f} s to initialize)")
    return model


def random_tokens(config: UnifiedTransformerConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """Token and modality ids [BATCH, LENGTH]: text, then an image, then sound, as one sequence."""
    modality_ids = torch.tensor([0, 1, 2]).repeat_interleave(torch.tensor([LENGTH // 4, LENGTH // 2, LENGTH // 4]))
    sizes = torch.tensor(list(config.vocab_sizes.values()))[modality_ids]
    generator = torch.Generator().manual_seed(0)
    token_ids = (torch.rand(BATCH, LENGTH, generator=generator) * sizes).long()
    return token_ids.to(config.device), modality_ids.expand(BATCH, LENGTH).to(config.device)


def call(model: UnifiedTransformer, token_ids: torch.Tensor, modality_ids: torch.Tensor) -> None:
    """The two-tuple of the reference, and the text logits beside it."""
    with torch.no_grad(), torch.autocast(token_ids.device.type, dtype=torch.bfloat16):
        image_logits, audio_logits = model(token_ids, modality_ids)
        text_logits = model.text_logits(model.hidden_states(token_ids, modality_ids))
    row("attention backend", str(model.attention_backend))
    row("token_ids, modality_ids", f"{shape(token_ids)}, {shape(modality_ids)}")
    row("image_logits", shape(image_logits))
    row("audio_logits", shape(audio_logits))
    row("text_logits", f"{shape(text_logits)}, {'tied' if model.config.tie_text_embeddings else 'own head'}")


def train_one_step(model: UnifiedTransformer, batch: PackedBatch) -> None:
    """Forward and backward in bfloat16, weights and update in float32."""
    # SGD, because the moments of AdamW would not fit beside the reference configuration on one GPU of 139 GiB.
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, foreach=False)

    def loss() -> torch.Tensor:
        with torch.autocast(batch.token_ids.device.type, dtype=torch.bfloat16):
            output = model.loss(batch)
        for name, total in output.sums.items():
            row(f"  {name}", f"{float(total) / output.counts[name]:.3f} nats over {output.counts[name]} targets")
        return output.total

    title("Mixed precision: bfloat16 autocast, float32 weights")
    row("loss before", "")
    before = loss()
    before.backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=False)
    optimizer.step()
    optimizer.zero_grad()
    row("gradient norm", f"{float(norm):.3f}, clipped to 1")
    row("loss after one step", "")
    with torch.no_grad():
        after = loss()
    row("loss", f"{before.item():.4f} -> {after.item():.4f}")
    if batch.token_ids.is_cuda:
        row("peak GPU memory", f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB")


def shape(tensor: torch.Tensor) -> str:
    """Shape and type of a tensor, as in `(2, 128, 1024) bfloat16`."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def title(text: str) -> None:
    """Open a section of the output."""
    print(f"\n{text}\n{'-' * len(text)}")


def row(name: str, value: str) -> None:
    """One line of a section."""
    print(f"{name:<26}{value}".rstrip())


if __name__ == "__main__":
    main()
