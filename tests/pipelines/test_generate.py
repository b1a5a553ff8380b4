"""A model continues prompts: by the grammar, within the wishes, reproducibly; and refuses what it cannot."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.generate import GenerateError, Generator, Prompt, Request, Sample, Sampling, generate, write
from pipelines.generate.continuation import Continuation
from pipelines.generate.prompt import encode_prompt
from pipelines.generate.request import wishes
from pipelines.generate.streaming import TextStream
from pipelines.interleave import EncodedSpan
from pipelines.pretrain.checkpoint import CheckpointError
from pipelines.pretrain.export import export_model
from pipelines.pretrain.parallelize import join_ranks
from pipelines.recipe import read_recipe
from pipelines.sequence import Modality, SequenceError, Vocabulary, VocabularyError, parse
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines import tiny

CONTEXT = 200
GREEDY = Sampling(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny tokenizers, their recipe and a small corpus."""
    folder = tmp_path_factory.mktemp("generate")
    tiny.write_corpus(folder, stamps=1, lines=1)
    tiny.write_recipe(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(folder: Path) -> TokenizeRecipe:
    return read_recipe(TokenizeRecipe, folder / "recipe.yaml")


@pytest.fixture(scope="module")
def tokenizers(recipe: TokenizeRecipe) -> Tokenizers:
    return Tokenizers.load(recipe)


@pytest.fixture(scope="module")
def vocabulary(tokenizers: Tokenizers, recipe: TokenizeRecipe) -> Vocabulary:
    """Images are 4 x 4 codes of 32, audio 2 codebooks of 16 at 100 Hz in spans of at most 40 frames."""
    return tokenizers.vocabulary(recipe)


def _model(vocabulary: Vocabulary, **changes: object) -> UnifiedTransformer:
    sizes = {f"{m.label}_vocab_size": max(1, vocabulary.size(m)) for m in Modality}
    settings = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 4, "ffn_hidden_size": 64, "device": "cpu"}
    # Large weights, so that the next token depends on all before it and no two logits are nearly equal.
    config = UnifiedTransformerConfig(**(sizes | settings | {"max_sequence_length": CONTEXT} | changes))  # type: ignore[arg-type]
    return UnifiedTransformer(replace(config, initializer_std=0.3), seed=1)


@pytest.fixture(scope="module")
def generator(vocabulary: Vocabulary, tokenizers: Tokenizers) -> Generator:
    return Generator(_model(vocabulary).double(), vocabulary, tokenizers, name="tiny")


def _tokens(sample: Sample) -> tuple[list[int], list[int]]:
    return sample.sequence.token_ids.tolist(), sample.sequence.modality_ids.tolist()


def _next_logits(generator: Generator, ids: list[int], kinds: list[int], modality: Modality) -> torch.Tensor:
    hidden = generator.model.hidden_states(torch.tensor([ids]), torch.tensor([kinds]))[0, -1]
    return torch.nn.functional.linear(hidden, generator.model.head_weight(modality.label))


@torch.no_grad()
def _by_full_forwards(generator: Generator, prompt: Prompt, request: Request) -> list[int]:
    """The likeliest tokens, by a whole forward pass for each, without a cache."""
    audio = generator.tokenizers.audio
    assert audio is not None
    wanted = wishes(request, generator.vocabulary, frame_rate_hz=audio.frame_rate_hz, whose="tiny")
    encoded = encode_prompt(prompt, generator.vocabulary, generator.tokenizers)
    row = Continuation(generator.vocabulary, encoded, wanted, CONTEXT)
    while row.allowed is not None:
        sampling = request.sampling_of(row.allowed.modality)
        logits = _next_logits(generator, row.token_ids, row.modality_ids, row.allowed.modality)
        if sampling.guidance != 1:
            new = slice(row.prompt_tokens, None)
            without = _next_logits(
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
        assert sample.sequence.token_ids.tolist() == _by_full_forwards(generator, prompt, request)


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
        assert sample.sequence.token_ids.tolist() == _by_full_forwards(generator, prompt, request)
    assert [_tokens(s) for s in samples[:2]] != [_tokens(s) for s in generator.generate(prompts, plain)[:2]]


def test_guidance_is_by_modality_and_without_it_the_prompt_is_forgotten(generator: Generator) -> None:
    def codes(prompt: str, guidance: float) -> bytes:
        request = Request(want="image", sampling={"image": replace(GREEDY, guidance=guidance), "text": GREEDY})
        return generator.generate([prompt], request)[0].sequence.token_ids[-17:].tobytes()

    assert codes("the fox", 0.0) == codes("lazy dogs", 0.0) == codes("", 1.0)
    assert codes("the fox", 1.0) != codes("lazy dogs", 1.0)


def test_a_guided_sample_depends_on_its_seed_alone(generator: Generator) -> None:
    sampling = Sampling(guidance=2.5, repetition_penalty=1.2, top_k=12)
    request = Request(want=["text", "image"], sampling=sampling, samples=3, seed=5, max_tokens=8)
    samples = [_tokens(s) for s in generator.generate(["the fox"], request)]
    assert samples == [_tokens(s) for s in generator.generate(["lazy dogs jump", "the fox"], request)][3:]
    assert samples == [_tokens(s) for s in generator.generate(["the fox"], replace(request, batch_size=2))]


def test_a_penalty_makes_texts_repeat_less(generator: Generator) -> None:
    def repeated(penalty: float) -> int:
        request = Request(sampling=Sampling(temperature=0.3, repetition_penalty=penalty), samples=12, max_tokens=30)
        ids = [s.sequence.token_ids[1:-1].tolist() for s in generator.generate(["the fox"], request)]
        return sum(len(held) - len(set(held)) for held in ids)

    assert repeated(3.0) < repeated(1.0) / 2


@pytest.mark.parametrize("want", ["text", ["text", "image", "text"]], ids=str)
def test_streamed_text_is_the_text_in_the_end(generator: Generator, want: str | list[str]) -> None:
    told: dict[int, list[str]] = {}
    request = Request(want=want, samples=4, max_tokens=25, batch_size=3)
    samples = generator.generate(
        ["the fox", ""], request, on_text=lambda index, text: told.setdefault(index, []).append(text)
    )
    for index, sample in enumerate(samples):
        assert "".join(told[index]) == "".join(span.text or "" for span in sample.spans)
    assert max(len(parts) for parts in told.values()) > 3


def test_half_a_character_is_never_told(generator: Generator) -> None:
    text, vocabulary = generator.tokenizers.text, generator.vocabulary
    prompt = encode_prompt("", vocabulary, generator.tokenizers)
    row = Continuation(vocabulary, prompt, wishes(Request(), vocabulary, frame_rate_hz=1, whose="tiny"), CONTEXT)
    told: list[str] = []
    stream = TextStream([row], text.decode, lambda index, new: told.append(new))
    for piece in text.encode(["\N{SNOWMAN} \N{CAT FACE}!"])[0].tolist():
        row.take(piece)
        stream.piece(0, piece)
    stream.close()
    assert told == ["\N{SNOWMAN}", " ", "\N{CAT FACE}", "!"]


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
    generator = Generator(_model(free, max_sequence_length=50), free, tokenizers)
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
    samples = [_tokens(s) for s in generator.generate(["the fox"], request)]
    assert samples == [_tokens(s) for s in generator.generate(["the fox"], request)]
    assert len({str(s) for s in samples}) == 3
    assert samples[:1] == [_tokens(s) for s in generator.generate(["the fox"], replace(request, samples=1))]
    assert samples == [_tokens(s) for s in generator.generate(["lazy dogs", "the fox"], request)][3:]
    assert samples == [_tokens(s) for s in generator.generate(["the fox"], replace(request, batch_size=2))]
    others = [_tokens(s) for s in generator.generate(["the fox"], replace(request, seed=6))]
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
    [row] = worker._laid_out([prepared], worker._stage([prepared])()())
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
    mute = Generator(_model(silent), silent, replace(tokenizers, audio=None), name="runs/mute")
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
            Generator(_model(vocabulary), vocabulary, changed)


def test_a_diverged_model_is_refused(vocabulary: Vocabulary, tokenizers: Tokenizers) -> None:
    model = _model(vocabulary)
    model.final_norm.weight.data.fill_(torch.nan)
    with pytest.raises(GenerateError, match="NaN or infinity"):
        Generator(model, vocabulary, tokenizers).generate([""], Request())


@pytest.fixture(scope="module")
def checkpoint(vocabulary: Vocabulary, recipe: TokenizeRecipe, folder: Path) -> Path:
    about = {"step": 7, "tokenizers": recipe.tokenizers.model_dump(mode="json")}
    with join_ranks("cpu") as ranks:
        export_model(folder / "run/model", _model(vocabulary), vocabulary, about, ranks)  # type: ignore[arg-type]
    return folder / "run"


def test_a_checkpoint_makes_files_with_their_settings_beside_and_inside_them(
    checkpoint: Path, tmp_path: Path, vocabulary: Vocabulary
) -> None:
    prompt = "the fox & “dogs”"
    for want, suffix in [("text", ".txt"), ("image", ".png"), ("audio", ".wav")]:
        samples = generate(checkpoint, prompt=prompt, want=want, out=tmp_path, samples=2, seed=4, max_tokens=9)
        assert [s.files for s in samples] == [(tmp_path / f"the-fox-dogs-seed4-{i}{suffix}",) for i in (0, 1)]
        record = json.loads((tmp_path / f"the-fox-dogs-seed4-1{suffix}.json").read_text())
        assert record["prompt"] == [{"text": prompt}]
        assert (record["seed"], record["sample"], record["step"]) == (4, 1, 7)
        assert record["sampling"][want] == asdict(Sampling())
        assert (record["checkpoint"], record["fingerprint"]) == (str(checkpoint), vocabulary.fingerprint)
        tokens = record.pop("tokens")
        spans = parse(vocabulary, np.array(tokens["token_ids"], np.int32), np.array(tokens["modality_ids"], np.int8))
        assert spans[-1].modality.label == record["modality"] == want
        if want == "image":
            with Image.open(samples[1].files[0]) as picture:
                assert json.loads(picture.info["braid"]) == record  # type: ignore[attr-defined]
                assert picture.info["Description"] == prompt
        if want == "audio":
            with soundfile.SoundFile(samples[1].files[0]) as sound:
                assert json.loads(sound.comment) == record
                assert sound.title == prompt
                assert sound.frames == 80 * spans[-1].rows


def test_a_seed_reproduces_the_bytes_of_all_files(checkpoint: Path, tmp_path: Path) -> None:
    made: list[dict[str, bytes]] = []
    for name, seed in [("a", 1), ("b", 1), ("c", 2)]:
        generate(checkpoint, want=["text", "image", "audio"], out=tmp_path / name, samples=2, seed=seed, max_tokens=9)
        made.append({file.name.replace("seed2", "seed1"): file.read_bytes() for file in (tmp_path / name).iterdir()})
    assert len(made[0]) == 12
    assert made[0] == made[1]
    assert made[0].keys() == made[2].keys()
    assert all(made[0][name] != made[2][name] for name in made[0])


def test_a_model_of_the_first_codebooks_gets_a_tokenizer_of_them(
    vocabulary: Vocabulary, recipe: TokenizeRecipe, tmp_path: Path
) -> None:
    fewer = vocabulary.first_codebooks(1)
    about = {"tokenizers": recipe.tokenizers.model_dump(mode="json")}
    with join_ranks("cpu") as ranks:
        export_model(tmp_path / "model", _model(fewer), fewer, about, ranks)  # type: ignore[arg-type]
    [sample] = generate(tmp_path, want="audio", seconds=0.1)
    assert sample.sequence.spans[0].columns == 1
    assert sample.spans[0].waveform is not None
    assert sample.spans[0].waveform.shape == (800,)


def test_a_damaged_or_incomplete_checkpoint_is_refused(checkpoint: Path, folder: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "run"
    shutil.copytree(checkpoint, copy)
    weights = copy / "model/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model.safetensors is truncated or changed"):
        generate(copy)
    with pytest.raises(CheckpointError, match="no exported model here"):
        generate(tmp_path / "nowhere")


@pytest.mark.parametrize("device", ["foo", "", "meta", "cuda:99"])
def test_a_device_that_is_not_here_is_refused_with_the_remedy(checkpoint: Path, device: str) -> None:
    with pytest.raises(GenerateError, match=rf"device is '{device}': .*; (use|choose) cpu"):
        generate(checkpoint, device=device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cuda_without_a_gpu_is_refused_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    with pytest.raises(GenerateError, match=r"device is 'cuda': torch .* sees no such device here; use cpu"):
        Generator.load(tmp_path / "nowhere", device="cuda")


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


def test_a_watcher_hears_of_every_token_it_was_promised(generator: Generator) -> None:
    class Count:
        promised = heard = 0

        def started(self, tokens: int) -> None:
            self.promised = tokens

        def advanced(self, tokens: int) -> None:
            self.heard += tokens

    count = Count()
    generator.generate(["the fox"], Request(want="image", samples=3), count)
    assert count.promised == count.heard == 3 * (3 + 16 + 1)
