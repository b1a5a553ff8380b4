"""Guidance and the repetition penalty are what full forward passes say they are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from pipelines.generate import Generator, Prompt, Request, Sampling
from tests.pipelines.generate.parts import GREEDY, by_full_forwards, tokens_of


@pytest.mark.parametrize(
    "changed", [{"guidance": 3.0}, {"repetition_penalty": 1.7}, {"guidance": 2.0, "repetition_penalty": 1.3}], ids=str
)
def test_guidance_and_penalty_equal_those_by_full_forward_passes(
    generator: Generator, changed: dict[str, float]
) -> None:
    prompts: list[Prompt] = ["the quick brown fox jumps over", "lazy", ""]
    plain = Request(want=["image", "text", "audio"], sampling=GREEDY, max_tokens=6, seconds=0.1)
    request = replace(plain, sampling=replace(GREEDY, **changed))
    samples = generator.generate(prompts, request)
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample.sequence.token_ids.tolist() == by_full_forwards(generator, prompt, request)
    assert [tokens_of(s) for s in samples[:2]] != [tokens_of(s) for s in generator.generate(prompts, plain)[:2]]


def test_guidance_is_by_modality_and_without_it_the_prompt_is_forgotten(generator: Generator) -> None:
    def codes(prompt: str, guidance: float) -> bytes:
        request = Request(want="image", sampling={"image": replace(GREEDY, guidance=guidance), "text": GREEDY})
        return generator.generate([prompt], request)[0].sequence.token_ids[-17:].tobytes()

    assert codes("the fox", 0.0) == codes("lazy dogs", 0.0) == codes("", 1.0)
    assert codes("the fox", 1.0) != codes("lazy dogs", 1.0)


def test_a_guided_sample_depends_on_its_seed_alone(generator: Generator) -> None:
    sampling = Sampling(guidance=2.5, repetition_penalty=1.2, top_k=12)
    request = Request(want=["text", "image"], sampling=sampling, samples=3, seed=5, max_tokens=8)
    samples = [tokens_of(s) for s in generator.generate(["the fox"], request)]
    assert samples == [tokens_of(s) for s in generator.generate(["lazy dogs jump", "the fox"], request)][3:]
    assert samples == [tokens_of(s) for s in generator.generate(["the fox"], replace(request, batch_size=2))]


def test_a_penalty_makes_texts_repeat_less(generator: Generator) -> None:
    def repeated(penalty: float) -> int:
        request = Request(sampling=Sampling(temperature=0.3, repetition_penalty=penalty), samples=12, max_tokens=30)
        ids = [s.sequence.token_ids[1:-1].tolist() for s in generator.generate(["the fox"], request)]
        return sum(len(held) - len(set(held)) for held in ids)

    assert repeated(3.0) < repeated(1.0) / 2
