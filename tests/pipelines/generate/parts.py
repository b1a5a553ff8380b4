"""A tiny model, and generation without a cache."""

from __future__ import annotations

from dataclasses import replace

import torch

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.generate import Generator, Prompt, Request, Sample, Sampling
from pipelines.generate.continuation import Continuation
from pipelines.generate.prompt import encode_prompt
from pipelines.generate.request import wishes
from pipelines.sequence import Modality, Vocabulary

CONTEXT = 200


GREEDY = Sampling(temperature=0)


def make_model(vocabulary: Vocabulary, **changes: object) -> UnifiedTransformer:
    sizes = {f"{m.label}_vocab_size": max(1, vocabulary.size(m)) for m in Modality}
    settings = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "device": "cpu"}
    # Large weights, so that the next token depends on all before it and no two logits are nearly equal.
    config = UnifiedTransformerConfig(**(sizes | settings | {"max_sequence_length": CONTEXT} | changes))  # type: ignore[arg-type]
    return UnifiedTransformer(replace(config, initializer_std=0.3), seed=1)


def tokens_of(sample: Sample) -> tuple[list[int], list[int]]:
    return sample.sequence.token_ids.tolist(), sample.sequence.modality_ids.tolist()


def next_logits(generator: Generator, ids: list[int], kinds: list[int], modality: Modality) -> torch.Tensor:
    hidden = generator.model.hidden_states(torch.tensor([ids]), torch.tensor([kinds]))[0, -1]
    return torch.nn.functional.linear(hidden, generator.model.head_weight(modality.label))


@torch.no_grad()
def by_full_forwards(generator: Generator, prompt: Prompt, request: Request) -> list[int]:
    """The likeliest tokens, by a whole forward pass for each, without a cache."""
    audio = generator.tokenizers.audio
    assert audio is not None
    wanted = wishes(request, generator.vocabulary, frame_rate_hz=audio.frame_rate_hz, whose="tiny")
    encoded = encode_prompt(prompt, generator.vocabulary, generator.tokenizers)
    row = Continuation(generator.vocabulary, encoded, wanted, CONTEXT)
    while row.allowed is not None:
        sampling = request.sampling_of(row.allowed.modality)
        logits = next_logits(generator, row.token_ids, row.modality_ids, row.allowed.modality)
        if sampling.guidance != 1:
            new = slice(row.prompt_tokens, None)
            without = next_logits(
                generator,
                [generator.vocabulary.document, *row.token_ids[new]],
                [0, *row.modality_ids[new]],
                row.allowed.modality,
            )
            logits = without + sampling.guidance * (logits - without)
        for token_id, kind in set(zip(row.token_ids, row.modality_ids, strict=True)):
            if kind == row.allowed.modality and (kind or token_id < generator.vocabulary.text_pieces):
                logits[token_id] *= sampling.repetition_penalty ** (-1 if logits[token_id] > 0 else 1)
        masked = torch.full_like(logits, -torch.inf)
        for low, high in row.allowed.ranges:
            masked[low:high] = logits[low:high]
        row.take(int(masked.argmax()))
    return row.token_ids
