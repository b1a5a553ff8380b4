"""A model continues prompts: by the grammar, within the wishes, reproducibly; and refuses what it cannot."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.generate import GenerateError, Generator, Prompt, Request, Sampling, write
from pipelines.generate.prompt import encode_prompt
from pipelines.interleave import EncodedSpan
from pipelines.sequence import Modality, SequenceError, Vocabulary, VocabularyError, parse
from pipelines.tokenize.layout import rows_of
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from pipelines.tokenize.windows import Chunk
from tests.pipelines import tiny
from tests.pipelines.generate.parts import CONTEXT, GREEDY, by_full_forwards, make_model, tokens_of


@pytest.mark.parametrize(
    "want", ["text", "image", "audio", ["text", "image"], ["image", "text", "audio"], ["audio", "audio"]], ids=str
)
def test_greedy_generation_equals_repeated_full_forward_passes_for_ragged_prompts(
    generator: Generator, want: str | list[str]
) -> None:
    prompts: list[Prompt] = ["the quick brown fox jumps over", "", "lazy"]
    request = Request(want=want, sampling=GREEDY, max_tokens=20)
    samples = generator.generate(prompts, request)
    assert len({sample.sequence.token_ids.tobytes() for sample in samples}) == 3
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample.sequence.token_ids.tolist() == by_full_forwards(generator, prompt, request)


@pytest.mark.parametrize("want", ["text", "image", "audio", ["text", "image", "text", "audio"]], ids=str)
def test_what_is_generated_is_a_document_with_the_wanted_spans(generator: Generator, want: str | list[str]) -> None:
    request = Request(want=want, samples=5, seed=3, max_tokens=12)
    for sample in generator.generate(["the fox", "", [_pixels(), "and dogs", _pixels()]], request):
        ids, kinds = sample.sequence.token_ids, sample.sequence.modality_ids
        spans = parse(generator.vocabulary, ids, kinds)
        assert spans == sample.sequence.spans
        new = [span for span in spans if span.start + span.length > sample.prompt_tokens]
        assert [span.modality.label for span in new] == ([want] if isinstance(want, str) else want)
        assert [span.modality for span in sample.spans] == [span.modality for span in new]
        assert len(ids) <= CONTEXT
        for span in new:
            if span.modality is Modality.IMAGE:
                assert (span.rows, span.columns) == (4, 4), "what the dataset was made with"
            elif span.modality is Modality.AUDIO:
                assert 1 <= span.rows <= 40, "no longer than any span of the dataset"


def _pixels() -> EncodedSpan:
    return EncodedSpan(modality=Modality.IMAGE, codes=np.random.default_rng(0).integers(0, 32, (4, 4), dtype=np.int32))


def test_the_model_chooses_sizes_that_fit_where_the_dataset_names_none(
    vocabulary: Vocabulary, tokenizers: Tokenizers
) -> None:
    free = replace(vocabulary, preprocessing={})
    generator = Generator(make_model(free, max_sequence_length=50), free, tokenizers)
    samples = generator.generate(["the fox"], Request(want=["image", "audio"], samples=40))
    images, sounds = zip(*(sample.sequence.spans[1:] for sample in samples), strict=True)
    assert len({(span.rows, span.columns) for span in images}) > 10
    assert len({span.rows for span in sounds}) > 3
    assert max(len(sample.sequence.token_ids) for sample in samples) <= 50
    for sample in samples:
        parse(free, sample.sequence.token_ids, sample.sequence.modality_ids)


def test_asked_sizes_are_made(generator: Generator) -> None:
    image, sound = generator.generate([""], Request(want=["image", "audio"], rows=2, columns=7, seconds=0.65))[0].spans
    assert image.pixels is not None
    assert image.pixels.shape == (8, 28, 3)
    assert sound.waveform is not None
    assert len(sound.waveform) == 0.65 * 8000


def test_text_ends_by_the_model_or_at_its_limit(generator: Generator) -> None:
    samples = generator.generate(["the fox"], Request(max_tokens=30, samples=40))
    lengths = [len(s.sequence.token_ids) - s.prompt_tokens - 1 for s in samples]
    assert all(1 <= length <= 30 for length in lengths)
    assert {s.truncated for s in samples} == {True, False}, "ended by itself, and cut"
    assert all(length == 30 for length, s in zip(lengths, samples, strict=True) if s.truncated)


def test_a_continued_text_holds_what_was_added_and_its_spaces(generator: Generator) -> None:
    for sample in generator.generate(["the fox"], Request(max_tokens=8, samples=5)):
        whole = generator.tokenizers.text.decode(sample.sequence.token_ids[1:-1])
        assert whole == "the fox" + sample.text


def test_a_seed_fixes_a_sample_whatever_is_generated_beside_it(generator: Generator) -> None:
    request = Request(want=["text", "image", "audio"], samples=3, seed=5, max_tokens=10)
    samples = [tokens_of(s) for s in generator.generate(["the fox"], request)]
    assert samples == [tokens_of(s) for s in generator.generate(["the fox"], request)]
    assert len({str(s) for s in samples}) == 3
    assert samples[:1] == [tokens_of(s) for s in generator.generate(["the fox"], replace(request, samples=1))]
    assert samples == [tokens_of(s) for s in generator.generate(["lazy dogs", "the fox"], request)][3:]
    assert samples == [tokens_of(s) for s in generator.generate(["the fox"], replace(request, batch_size=2))]
    others = [tokens_of(s) for s in generator.generate(["the fox"], replace(request, seed=6))]
    assert all(s not in others for s in samples)


def test_each_modality_has_its_own_sampling(generator: Generator) -> None:
    request = Request(want=["image", "audio"], sampling={"image": GREEDY, "text": GREEDY}, samples=4)
    images, sounds = zip(*(s.spans for s in generator.generate(["fox"], request)), strict=True)
    assert len({span.pixels.tobytes() for span in images}) == 1
    assert len({span.waveform.tobytes() for span in sounds}) == 4


def test_files_as_prompt_go_through_the_preprocessing_of_the_dataset(
    generator: Generator, recipe: TokenizeRecipe, folder: Path
) -> None:
    from pipelines.corpus.documents import Document, RawSpan
    from pipelines.corpus.filters import Filters
    from pipelines.tokenize.prepare import Prepared, prepare
    from pipelines.tokenize.worker import UnitWorker

    files = [folder / "stamps/s000.png", folder / "stamps/s000.wav"]
    spans = [
        RawSpan(modality=Modality.TEXT, text="the fox"),
        RawSpan(modality=Modality.IMAGE, data=files[0].read_bytes(), uri="a"),
        RawSpan(modality=Modality.AUDIO, data=files[1].read_bytes(), uri="b"),
    ]
    worker = UnitWorker(recipe)
    document = Document(source="s", position=0, spans=tuple(spans))
    prepared = prepare(document, Filters(), recipe.tokenizers, worker.tokenizers.shapes)
    assert isinstance(prepared, Prepared)
    chunk = Chunk.of([prepared])
    [row] = rows_of([([chunk.items], worker._stage([chunk])()())], worker.vocabulary)
    encoded = encode_prompt(["the fox", *files], generator.vocabulary, generator.tokenizers)
    assert encoded.token_ids.tolist() == row.sequence.token_ids[:-1].tolist()  # type: ignore[union-attr]
    assert encoded.modality_ids.tolist() == row.sequence.modality_ids[:-1].tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("text", ["</s><s>", "<|endoftext|>", "<|65|>", "<|0|>", "<| image |>", "<|IMAGE|>"])
def test_a_prompt_never_becomes_special_tokens(generator: Generator, text: str) -> None:
    encoded = encode_prompt(text, generator.vocabulary, generator.tokenizers)
    assert encoded.token_ids[0] == generator.vocabulary.document
    assert (encoded.token_ids[1:] < generator.vocabulary.text_pieces).all()
    processor = generator.tokenizers.text.processor
    assert not any(processor.is_control(int(i)) for i in encoded.token_ids[1:])


@pytest.mark.parametrize("token", ["<|document|>", "<|end|>", "<|image|>", "<|audio|>", "<|1|>", "<|64|>"])
def test_a_special_token_in_a_prompt_is_refused(generator: Generator, token: str) -> None:
    with pytest.raises(GenerateError, match=r"prompt: character 4: <\|.*\|> is a special token.*`want`"):
        generator.generate([f"the {token} fox"], Request())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"want": "video"}, "want: 'video' is no modality; choose from text, image, audio"),
        ({"want": "picture"}, "'picture' is no modality; did you mean image"),
        ({"want": []}, "want is empty"),
        ({"want": ["text", "text"]}, "text follows text"),
        ({"samples": 0}, "samples is 0"),
        ({"rows": 65}, "rows is 65: an image has 1 to 64"),
        ({"seconds": 0.0}, "seconds is 0"),
        ({"seconds": float("inf")}, "seconds is inf: give a finite length above 0"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"sampling": {"imge": Sampling()}}, "sampling: 'imge' is no modality; did you mean image"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(GenerateError, match=message):
        Request(**settings)  # type: ignore[arg-type]


def test_what_the_checkpoint_cannot_make_is_refused(generator: Generator, tokenizers: Tokenizers) -> None:
    with pytest.raises(GenerateError, match=r"seconds is 50: 5,000 frames at 100 Hz.* at most 40\.96 s"):
        generator.generate([""], Request(want="audio", seconds=50))
    silent = replace(generator.vocabulary, audio_codebook_size=0, audio_codebooks=0, audio_sha256="", preprocessing={})
    mute = Generator(make_model(silent), silent, replace(tokenizers, audio=None), name="runs/mute")
    with pytest.raises(GenerateError, match="want: runs/mute was trained without audio; it makes text, image"):
        mute.generate([""], Request(want="audio"))


def test_a_prompt_longer_than_the_context_is_refused_with_the_counts(generator: Generator) -> None:
    long = EncodedSpan(modality=Modality.TEXT, codes=np.full(181, 300, np.int32))
    fitting = replace(long, codes=long.codes[:179])
    message = (
        r"182 tokens, and an image of 4 x 4 codes with <\|end\|> need 20 more: 202 .* context of 200 .* to 180 tokens"
    )
    with pytest.raises(GenerateError, match=message):
        generator.generate([long], Request(want="image"))
    assert len(generator.generate([fitting], Request(want="image"))[0].sequence.token_ids) == 200
    with pytest.raises(GenerateError, match="ask for less"):
        generator.generate([""], Request(want="image", rows=20, columns=20))


def test_prompts_that_are_no_document_are_refused(generator: Generator, folder: Path) -> None:
    outside = EncodedSpan(modality=Modality.IMAGE, codes=np.full((4, 4), 32, np.int32))
    for prompt, kind, message in [
        (outside, SequenceError, "code 32 lies outside"),
        (["the", "fox"], SequenceError, "follows another text span"),
        (folder / "none.png", GenerateError, "no such file"),
        (folder / "recipe.yaml", GenerateError, "no known kind of file"),
    ]:
        with pytest.raises(kind, match=message):
            generator.generate([prompt], Request())  # type: ignore[list-item]


def test_other_tokenizers_than_the_vocabularys_are_refused(
    vocabulary: Vocabulary, tokenizers: Tokenizers, tmp_path: Path
) -> None:
    from pipelines.tokenizers.vqgan import ImageTokenizer

    other = ImageTokenizer.load(tiny.image_tokenizer(tmp_path / "image", seed=9))
    for changed, name in [
        (replace(tokenizers, image=other), "image_sha256"),
        (replace(tokenizers, audio=None), "audio"),
    ]:
        with pytest.raises(VocabularyError, match=name):
            Generator(make_model(vocabulary), vocabulary, changed)


def test_a_diverged_model_is_refused(vocabulary: Vocabulary, tokenizers: Tokenizers) -> None:
    model = make_model(vocabulary)
    model.final_norm.weight.data.fill_(torch.nan)
    with pytest.raises(GenerateError, match="NaN or infinity"):
        Generator(model, vocabulary, tokenizers).generate([""], Request())


@pytest.mark.parametrize("want", ["text", "image", "audio"])
def test_a_model_that_diverges_behind_the_prompt_is_refused_too(
    vocabulary: Vocabulary, tokenizers: Tokenizers, want: str
) -> None:
    model = make_model(vocabulary, tie_text_embeddings=False)
    table = model.embeddings[want].weight.data
    if want == "text":
        # The prompt's own pieces and the special tokens stay as they are.
        table[torch.arange(len(table)) < vocabulary.text_pieces] = torch.nan
    else:
        table.fill_(torch.nan)
    generator = Generator(model, vocabulary, tokenizers)
    with pytest.raises(GenerateError, match="NaN or infinity"):
        generator.generate([""], Request(want=want, max_tokens=40, seconds=0.1 if want == "audio" else None))


def test_prompts_that_begin_alike_do_not_overwrite_each_other(generator: Generator, tmp_path: Path) -> None:
    prompts = ["the quick brown fox jumps over the lazy dogs and " + end for end in ("sleeps", "runs")]
    request = Request(want="image")
    names = [
        file.name
        for prompt in [*prompts, prompts[0], "fox"]
        for sample in write(generator.generate([prompt], request), tmp_path, generator.settings(request))
        for file in sample.files
    ]
    assert all(re.fullmatch(r"the-quick-brown-fox-jumps-over-the-lazy-[0-9a-f]{8}-seed0-0\.png", n) for n in names[:3])
    assert names[0] == names[2] != names[1]
    assert names[3] == "fox-seed0-0.png", "nothing was cut"
    assert len(list(tmp_path.iterdir())) == 2 * 3


def test_writing_needs_no_checkpoint(generator: Generator, tmp_path: Path) -> None:
    request = Request(want="image", samples=2)
    samples = write(generator.generate([""], request), tmp_path, generator.settings(request))
    assert [file.name for s in samples for file in s.files] == ["no-prompt-seed0-0.png", "no-prompt-seed0-1.png"]
