"""`braid evaluate`: its losses are validation's, its figures those of brute force, its refusals clear."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pipelines.cli import app
from pipelines.evaluate import Evaluation, evaluate
from pipelines.evaluate.distances import pixel_distance, thumbnail
from pipelines.evaluate.documents import Split
from pipelines.evaluate.evaluation import SCHEMA
from pipelines.evaluate.page import write_evaluation_page
from pipelines.evaluate.scoring import Scorer
from pipelines.generate import Generator
from pipelines.loading import Index, Loader
from pipelines.pretrain.baseline import unigram_cross_entropy
from pipelines.pretrain.parallelize import join_ranks
from pipelines.pretrain.validate import CrossEntropy, Validator
from pipelines.sequence import Modality
from pipelines.shards.dataset import Dataset
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenize.tokenizers import Tokenizers
from tests.pipelines.evaluate.parts import CONTEXT, make_model
from tests.pipelines.jobs import run_units

SCHEMA_FILE = Path(__file__).parents[3] / "docs/evaluate.schema.json"


def _validation(generator: Generator, dataset: Dataset) -> tuple[CrossEntropy, CrossEntropy]:
    """Loss and baseline as a run reports them."""
    index = Index.build(dataset, CONTEXT).split(validation=True)
    loader = Loader(index, sequences=2, micro_batch=2, seed=0, window_tokens=4000, endless=False, prefetch=0, workers=0)
    with join_ranks("cpu") as ranks:
        validator = Validator(loader, dataset.vocabulary, ranks)
        loss = validator.evaluate(generator.model)
    return loss, unigram_cross_entropy(dataset.statistics(), validator.counts, dataset.vocabulary)


def test_losses_and_unigram_are_those_that_validation_reports(
    generator: Generator, dataset: Dataset, found: Evaluation
) -> None:
    loss, baseline = _validation(generator, dataset)
    assert dict(found.cross_entropy.items()) == pytest.approx(dict(loss.items()), rel=1e-6)
    for name, value in baseline.items():
        modality, _, codebook = name.partition("/")
        told = found.figures["modalities"][modality]
        told = told["codebooks"][int(codebook)] if codebook else told
        assert told["unigram"]["loss"] == pytest.approx(value, rel=1e-12)


def test_every_figure_of_a_modality_equals_brute_force_in_float64(
    dataset: Dataset, tokenizers: Tokenizers, generator: Generator
) -> None:
    model, v = make_model(dataset.vocabulary).double(), dataset.vocabulary
    exact = Generator(model, v, tokenizers, name="exact")
    told = evaluate(exact, dataset.uri, generate=False).figures["modalities"]
    sums = {m: [0.0, 0, 0, 0] for m in Modality}
    pieces = size = images = 0.0
    frames = 0
    for document in Split.open(dataset.uri, v, context=CONTEXT, whose="exact"):
        ids, kinds = (torch.tensor(x).long() for x in (document.sequence.token_ids, document.sequence.modality_ids))
        special = torch.ones(len(ids), dtype=torch.bool)
        for span in document.sequence.spans:
            special[span.start : span.start + span.length] = False
        for start, stop in zip(document.bounds[:-1], document.bounds[1:], strict=True):
            with torch.no_grad():
                hidden = model.hidden_states(ids[None, start:stop], kinds[None, start:stop])[0]
            for t in range(start, min(stop, len(ids) - 1)):
                modality = Modality(int(kinds[t + 1]))
                logits = hidden[t - start] @ model.head_weight(modality.label).detach().T
                p = torch.softmax(logits, -1)
                order = torch.argsort(-logits).tolist()
                one = sums[modality]
                loss = -math.log(float(p[ids[t + 1]]))
                one[0] += loss
                one[1] += 1
                one[2] += int(order[0] == int(ids[t + 1]))
                one[3] += int(int(ids[t + 1]) in order[:5])
                pieces += loss * (modality is Modality.TEXT and not special[t + 1])
        for span in document.sequence.spans:
            codes = document.sequence.token_ids[span.start : span.start + span.length]
            if span.modality is Modality.TEXT:
                size += len(tokenizers.text.decode(codes).encode())
            images += span.modality is Modality.IMAGE
            frames += span.rows if span.modality is Modality.AUDIO else 0
    for modality, (loss, count, first, of_5) in sums.items():
        one = told[modality.label]
        assert one["targets"] == count
        assert one["loss"] == pytest.approx(loss / count, rel=1e-6)
        assert one["perplexity"] == pytest.approx(math.exp(loss / count), rel=1e-5)
        assert one["accuracy"] == {"1": first / count, "5": of_5 / count}
        assert one["loss_interval"][0] < one["loss"] < one["loss_interval"][1]
    assert told["text"]["bits"]["value"] == pytest.approx(pieces / math.log(2) / size, rel=1e-6)
    assert told["image"]["bits"]["value"] == pytest.approx(sums[Modality.IMAGE][0] / math.log(2) / images, rel=1e-6)
    seconds = frames / 100
    assert told["audio"]["bits"]["units"] == pytest.approx(seconds)
    assert told["audio"]["bits"]["value"] == pytest.approx(sums[Modality.AUDIO][0] / math.log(2) / seconds, rel=1e-6)


def test_bins_of_confidence_and_position_add_up_to_the_whole(found: Evaluation) -> None:
    for name, told in found.figures["modalities"].items():
        bins = found.figures["reliability"][name]
        targets = sum(b["targets"] for b in bins)
        assert targets == told["targets"]
        assert sum(b["targets"] * b["accuracy"] for b in bins) / targets == pytest.approx(told["accuracy"]["1"])
        error = sum(b["targets"] * abs(b["accuracy"] - b["confidence"]) for b in bins) / targets
        assert error == pytest.approx(told["calibration_error"])
        assert all(b["low"] <= b["confidence"] <= b["high"] + 1e-6 for b in bins)
    for name in ("image", "audio"):
        told, bins = found.figures["modalities"][name], found.figures["positions"][name]
        for whole, part in ((told["loss"], "loss"), (told["unigram"]["loss"], "unigram")):
            mean = sum(b["targets"] * b[part] for b in bins) / told["targets"]
            assert mean == pytest.approx(whole, rel=1e-6)
    assert [b["low"] for b in found.figures["positions"]["image"]] == list(range(16))


def test_gain_is_the_difference_of_losses_of_the_same_tokens(
    generator: Generator, dataset: Dataset, found: Evaluation
) -> None:
    gains = {(g["given"], g["predicted"]): g for g in found.figures["gain"]}
    assert len(gains) == 6
    for entry in gains.values():
        for name, key in (("over_shuffled", "shuffled"), ("over_without", "without")):
            gain = entry["gain"][name]
            assert gain["nats"] == pytest.approx(entry["loss"][key] - entry["loss"]["own"], abs=1e-9)
            assert gain["interval"][0] <= gain["nats"] <= gain["interval"][1]
    # Without a partner the picture follows `<|document|>`, so its loss does not depend on what the partner would be.
    assert gains["text", "image"]["loss"]["without"] == gains["audio", "image"]["loss"]["without"]


def test_a_model_that_sees_one_token_alone_gains_nothing(dataset: Dataset, tokenizers: Tokenizers) -> None:
    model = make_model(dataset.vocabulary)
    for block in model.blocks:
        for parameter in block.attention.parameters():  # type: ignore[union-attr]
            torch.nn.init.zeros_(parameter)
    found = evaluate(Generator(model, dataset.vocabulary, tokenizers), dataset.uri, generate=False)
    media = [entry for entry in found.figures["gain"] if entry["predicted"] != "text"]
    assert len(media) == 4
    for entry in media:
        # The tokens that open a picture or a sound stand between it and its partner.
        assert entry["gain"]["over_shuffled"]["nats"] == pytest.approx(0, abs=1e-6)


def test_the_figures_are_as_the_schema_says_and_equal_every_time(
    generator: Generator, dataset: Dataset, found: Evaluation
) -> None:
    schema = json.loads(SCHEMA_FILE.read_text())
    assert schema["properties"]["schema"]["const"] == SCHEMA
    jsonschema.Draft202012Validator.check_schema(schema)
    figures = json.loads(json.dumps(found.figures, allow_nan=False))
    jsonschema.validate(figures, schema)
    assert figures.keys() == schema["properties"].keys()
    assert evaluate(generator, dataset.uri, samples=3).figures == found.figures
    plain = evaluate(generator, dataset.uri, generate=False).figures
    jsonschema.validate(plain, schema)
    assert plain == found.figures | {name: plain[name] for name in ("generation", "sampling", "remarks")}


def test_what_is_generated_is_measured_against_its_own_and_another_reference(found: Evaluation) -> None:
    told = {(g["given"], g["predicted"]): g for g in found.figures["generation"]}
    assert set(told) == {("text", "image"), ("text", "audio"), ("image", "text"), ("audio", "text")}
    picture = told["text", "image"]
    assert picture["samples"] == 3
    assert picture["originals_missing"] is None
    assert 0 < picture["pixel_distance"]["reconstruction"] < 1
    assert picture["code_distance"]["reconstruction"] == 0
    assert 0 <= picture["code_distance"]["own"] <= 1
    assert picture["nearest"]["codes"]["chance"] == pytest.approx(1 / 3)
    assert told["text", "audio"]["mel_distance_db"]["own"] > 0
    assert told["image", "text"]["exact"]["reconstruction"] == 1
    for shown in found.shown:
        assert shown.generated.modality is shown.reconstruction.modality is shown.direction[1]
        if shown.direction[1] is not Modality.TEXT:
            assert shown.original is not None
    sounds = [s.generated.waveform for s in found.shown if s.direction == (Modality.TEXT, Modality.AUDIO)]
    assert len({len(sound) for sound in sounds if sound is not None}) > 1, "a voice takes the time that it wants"
    pictures = [s for s in found.shown if s.direction == (Modality.TEXT, Modality.IMAGE)]
    mean = np.mean([s.told["pixel distance"] for s in pictures])
    assert mean == pytest.approx(picture["pixel_distance"]["own"])
    again = [
        pixel_distance(thumbnail(s.generated.pixels), thumbnail(s.reconstruction.pixels))  # type: ignore[arg-type]
        for s in pictures
    ]
    assert mean == pytest.approx(np.mean(again))


def test_a_limit_draws_documents_by_the_seed(dataset: Dataset) -> None:
    def numbers(limit: int | None, seed: int) -> list[int]:
        split = Split.open(dataset.uri, dataset.vocabulary, context=CONTEXT, whose="x", limit=limit, seed=seed)
        found = [document.number for document in split]
        assert len(found) == split.documents
        return found

    everything = numbers(None, 0)
    assert numbers(5, 1) == numbers(5, 1)
    assert len({tuple(numbers(5, seed)) for seed in range(5)}) > 1
    assert len(numbers(5, 1)) == 5
    assert set(numbers(5, 1)) < set(everything)
    assert numbers(10_000, 1) == everything


def test_the_two_splits_are_all_documents(dataset: Dataset) -> None:
    splits = [
        Split.open(dataset.uri, dataset.vocabulary, context=CONTEXT, whose="x", split=name)
        for name in ("validation", "train")
    ]
    found = sorted(document.number for split in splits for document in split)
    assert found == list(range(dataset.statistics().documents))
    assert sum(split.tokens for split in splits) == dataset.statistics().tokens()


def test_the_loss_of_a_document_does_not_depend_on_its_company(generator: Generator, dataset: Dataset) -> None:
    documents = list(Split.open(dataset.uri, dataset.vocabulary, context=CONTEXT, whose="x"))
    assert any(len(document.bounds) > 2 for document in documents)
    scorer = Scorer(generator.model, dataset.vocabulary.end)
    together = [scores for _, scores in scorer.documents(documents)]
    for document, scores in zip(documents, together, strict=True):
        [alone] = scorer.score([(document.sequence, document.bounds)])
        np.testing.assert_allclose(alone.losses, scores.losses, rtol=1e-4, atol=1e-5)
        assert scores.losses[0] == 0
        assert (scores.losses[1:] > 0).all()


def test_a_checkpoint_of_the_first_codebooks_is_evaluated_on_a_view(
    dataset: Dataset, tokenizers: Tokenizers, recipe: TokenizeRecipe
) -> None:
    from pipelines.tokenizers.encodec import AudioTokenizer

    assert recipe.tokenizers.audio
    fewer = dataset.vocabulary.first_codebooks(1)
    audio = AudioTokenizer.load(recipe.tokenizers.audio.checkpoint, n_q=1)
    view = Generator(make_model(fewer), fewer, replace(tokenizers, audio=audio))
    told = evaluate(view, dataset.uri, generate=False).figures["modalities"]["audio"]
    assert len(told["codebooks"]) == 1
    assert told["codebooks"][0]["loss"] == told["loss"]


def test_a_modality_that_no_document_has_is_told_and_not_measured(
    generator: Generator, recipe: TokenizeRecipe, folder: Path
) -> None:
    texts = recipe.model_copy(update={"dataset": str(folder / "texts"), "sources": recipe.sources[1:]})
    run_units(texts)
    found = evaluate(generator, texts.dataset)
    assert found.figures["modalities"]["image"] is None
    assert found.figures["gain"] == found.figures["generation"] == found.shown == []
    assert "image: no document here has any, so it is not measured" in found.figures["remarks"]
    jsonschema.validate(found.figures, json.loads(SCHEMA_FILE.read_text()))


def test_the_command_prints_tables_or_json_and_writes_the_page(
    checkpoint: Path, dataset: Dataset, tmp_path: Path
) -> None:
    arguments = ["evaluate", str(checkpoint), dataset.uri, "--limit", "12", "--samples", "2", "--device", "cpu"]
    page = tmp_path / "page.html"
    told = CliRunner().invoke(app, [*arguments, "--json", "--html", str(page)], catch_exceptions=False)
    figures = json.loads(told.stdout)
    jsonschema.validate(figures, json.loads(SCHEMA_FILE.read_text()))
    assert (figures["documents"], figures["checkpoint"]["step"]) == (12, 7)
    assert page.stat().st_size > 10_000
    shown = CliRunner().invoke(app, [*arguments, "--no-generate"], catch_exceptions=False, env={"COLUMNS": "200"})
    assert f"{figures['modalities']['image']['loss']:.3f}" in shown.stdout
    assert "unigram" in shown.stdout


def test_what_a_checkpoint_tells_of_itself_is_taken_for_a_number_only_if_it_is_one(
    checkpoint: Path, dataset: Dataset, tmp_path: Path
) -> None:
    copy = shutil.copytree(checkpoint, tmp_path / "run")
    file = copy / "model/braid.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"step": "[red]<b>seven", "tokens": True}))
    told = evaluate(copy, dataset.uri, limit=2, generate=False, device="cpu").figures["checkpoint"]
    assert (told["step"], told["tokens"]) == (None, None)


def test_hostile_texts_do_not_become_markup(found: Evaluation, tmp_path: Path) -> None:
    hostile = "<img src=http://evil.example/x.png onerror=alert(1)>"
    shown = [replace(s, given=replace(s.given, text=hostile)) for s in found.shown if s.given.text is not None]
    page = write_evaluation_page(tmp_path / "page.html", replace(found, shown=shown)).read_text()
    assert "<img src=http" not in page
    assert "&lt;img src=http://evil.example" in page
