"""The parts of pretraining that need no run: recipe, schedule, optimizer groups, compiled blocks."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch

from model import UnifiedTransformer, UnifiedTransformerConfig
from pipelines.pretrain.initialization import share_codebook_directions
from pipelines.pretrain.optimizer import make_optimizer
from pipelines.pretrain.recipe import ModelSettings, OptimizerSettings, PretrainRecipe, ScheduleSettings, model_config
from pipelines.pretrain.schedule import learning_rate_factor
from pipelines.pretrain.step import seed_step
from pipelines.recipe import RecipeError, read_recipe
from pipelines.sequence import Vocabulary
from tests.pipelines.corpora import VOCABULARY


def _read(tmp_path: Path, text: str) -> PretrainRecipe:
    (tmp_path / "r.yaml").write_text(text)
    return read_recipe(PretrainRecipe, tmp_path / "r.yaml")


def test_every_fault_of_a_recipe_is_named_at_once(tmp_path: Path) -> None:
    recipe = "output: o\ndata: {dataset: d, sequence_lenght: 64}\nmodel: {hiden_size: 4}\nprecision: fp8\nsteps: 0\n"
    with pytest.raises(RecipeError) as refused:
        _read(tmp_path, recipe)
    said = str(refused.value)
    assert "4 faults" in said
    assert "r.yaml:2: data.sequence_lenght: unknown key; did you mean sequence_length?" in said
    assert "r.yaml:3: model.hiden_size: unknown key; did you mean hidden_size?" in said
    assert "r.yaml:4: precision = 'fp8'" in said
    assert "r.yaml:5: steps = 0" in said


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("steps: 5\ntokens: 7", "give one of them"),
        ("model: {hidden_size: 10, num_attention_heads: 3}\nsteps: 5", "does not divide hidden_size"),
        ("loss_weights: {text: 0, image: 0, audio: 0}\nsteps: 5", "all weights are 0"),
        ("batch: {sequences: 10, micro_batch: 4}\nsteps: 5", "must be a multiple of batch.micro_batch = 4"),
        ("schedule: {warmup_steps: 5}\nsteps: 5", "schedule.warmup_steps is 5 and the run has 5 steps"),
        (
            "schedule: {kind: wsd, warmup_steps: 3, decay_steps: 8}\nsteps: 10",
            "schedule.warmup_steps is 3 and schedule.decay_steps 8: they must fit into the 10 steps",
        ),
        ("optimizer: {learning_rate: .inf}\nsteps: 5", "optimizer.learning_rate = inf"),
        ("precision: fp32\nmasters: optimizer\nsteps: 5", "masters is 'optimizer', which keeps weights in bf16"),
        ("optimizer: {moments: bf16}\nsteps: 5", "set masters to 'optimizer', or moments to 'fp32'"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(tmp_path: Path, text: str, fault: str) -> None:
    with pytest.raises(RecipeError, match=fault):
        _read(tmp_path, f"output: o\ndata: {{dataset: d}}\n{text}\n")


def test_a_recipe_knows_every_hyperparameter_but_those_that_data_and_machine_decide() -> None:
    decided = {"text_vocab_size", "image_vocab_size", "audio_vocab_size", "max_sequence_length", "device"}
    assert {f.name for f in fields(UnifiedTransformerConfig)} == decided | set(ModelSettings.model_fields)
    reference = UnifiedTransformerConfig()
    assert all(getattr(reference, name) == value for name, value in ModelSettings().model_dump().items())


def test_vocabulary_sizes_come_from_the_dataset(tmp_path: Path) -> None:
    recipe = _read(tmp_path, "output: o\ndata: {dataset: d, sequence_length: 128}\nsteps: 5\n")
    config = model_config(recipe, VOCABULARY)
    assert (config.text_vocab_size, config.image_vocab_size, config.audio_vocab_size) == (118, 32, 32)
    assert config.max_sequence_length == 128
    text_only = model_config(recipe, Vocabulary(text_pieces=50, text_sha256="t"))
    assert (text_only.image_vocab_size, text_only.audio_vocab_size) == (1, 1)


def test_a_token_budget_is_rounded_up_to_whole_steps(tmp_path: Path) -> None:
    recipe = "output: o\ndata: {dataset: d, sequence_length: 100}\nbatch: {sequences: 4, micro_batch: 2}\ntokens: 801\n"
    assert _read(tmp_path, recipe).total_steps == 3


def test_the_learning_rate_warms_up_and_reaches_the_minimum_with_the_last_step() -> None:
    cosine = ScheduleSettings(kind="cosine", warmup_steps=4, minimum=0.1)
    factors = [learning_rate_factor(cosine, step, 24) for step in range(24)]
    assert factors[:4] == [0.25, 0.5, 0.75, 1.0]
    assert factors[13] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1)
    assert factors[3:] == sorted(factors[3:], reverse=True)
    wsd = ScheduleSettings(kind="wsd", warmup_steps=4, decay_steps=5, minimum=0.0)
    factors = [learning_rate_factor(wsd, step, 24) for step in range(24)]
    assert factors[3:19] == [1.0] * 16
    assert factors[19:] == pytest.approx([0.8, 0.6, 0.4, 0.2, 0.0])
    short = [learning_rate_factor(ScheduleSettings(warmup_steps=9), step, 3) for step in range(3)]
    assert short == pytest.approx([1 / 9, 2 / 9, 3 / 9])


@pytest.mark.parametrize("kind", ["cosine", "wsd"])
@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (9, 0), (20, 2), (999, 99), (5000, 100)])
def test_a_schedule_left_to_itself_fits_every_run(tmp_path: Path, kind: str, steps: int, warmup: int) -> None:
    recipe = _read(tmp_path, f"output: o\ndata: {{dataset: d}}\nschedule: {{kind: {kind}}}\nsteps: {steps}\n")
    assert recipe.schedule.warmup(steps) == warmup
    assert learning_rate_factor(recipe.schedule, steps - 1, steps) == pytest.approx(0.1)


def test_the_shipped_recipe_may_be_cut_to_twenty_steps() -> None:
    assert read_recipe(PretrainRecipe, "pretrain/demo", ["steps=20"]).total_steps == 20


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_spares_norms_and_embeddings(tied: bool) -> None:
    config = UnifiedTransformerConfig(
        text_vocab_size=20, image_vocab_size=10, audio_vocab_size=10, hidden_size=16, num_layers=1,
        num_attention_heads=2, ffn_hidden_size=32, tie_text_embeddings=tied, qk_norm=True, use_rope=False,
    )  # fmt: skip
    model = UnifiedTransformer(config)
    optimizer = make_optimizer(model, OptimizerSettings())
    decayed, others = ({id(p) for p in group["params"]} for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    names = {name for name, p in model.named_parameters() if id(p) in others}
    assert all(("embedding" in name) or ("norm" in name) for name in names)
    assert len(decayed) + len(others) == len(list(model.parameters()))
    assert {"embeddings.text.weight", "position_embedding.weight"} <= names


def test_random_draws_of_a_step_depend_on_seed_step_and_rank_alone() -> None:
    drawn = set()
    for key in [(0, 1, 0), (0, 2, 0), (0, 1, 1), (1, 1, 0)]:
        seed_step(*key)
        first = torch.rand(4)
        torch.rand(100)
        seed_step(*key)
        assert torch.equal(torch.rand(4), first)
        drawn.add(tuple(first.tolist()))
    assert len(drawn) == 4


def test_audio_ids_of_one_codebook_start_alike_and_others_do_not() -> None:
    config = UnifiedTransformerConfig(
        text_vocab_size=118, image_vocab_size=32, audio_vocab_size=32, hidden_size=64, num_layers=1,
        num_attention_heads=2, ffn_hidden_size=32,
    )  # fmt: skip
    model = UnifiedTransformer(config, seed=0)
    share_codebook_directions(model, VOCABULARY, seed=0)
    for weight in (model.embeddings["audio"].get_parameter("weight"), model.heads["audio"].get_parameter("weight")):
        likeness = torch.corrcoef(weight.detach())
        assert likeness[:16, :16].mean() > 0.4
        assert likeness[16:, 16:].mean() > 0.4
        assert likeness[:16, 16:].mean().abs() < 0.2
