"""The training loop: next batch, forward and backward, clip, step, log, save.

Enters: a `PretrainRecipe`. Leaves: a run folder with metrics, checkpoints and the trained model. Always holds: a call that
is killed at any moment and made again ends with what an undisturbed one ends with, in fp32 on the CPU bit for bit.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from pipelines.loading import Index, Loader
from pipelines.pretrain.baseline import unigram_cross_entropy
from pipelines.pretrain.checkpoint import (
    Checkpoint,
    list_checkpoints,
    load_checkpoint,
    prune_checkpoints,
    read_checkpoint,
    save_checkpoint,
)
from pipelines.pretrain.export import export_model
from pipelines.pretrain.initialization import share_codebook_directions
from pipelines.pretrain.interruption import Interruption, lost_ranks
from pipelines.pretrain.metrics import Metrics
from pipelines.pretrain.optimizer import make_optimizer, set_learning_rate
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer, build_model, join_ranks
from pipelines.pretrain.recipe import PretrainRecipe, model_config
from pipelines.pretrain.run import (
    RunError,
    RunResult,
    claim_folder,
    hold_folder,
    pin_version,
    read_finished,
    write_finished,
    write_recipe,
)
from pipelines.pretrain.schedule import learning_rate_factor
from pipelines.pretrain.step import clip_gradients, forward_backward, seed_step
from pipelines.pretrain.telemetry import attention_peaks, by_modality
from pipelines.pretrain.validate import CrossEntropy, Validator
from pipelines.sequence import Vocabulary
from pipelines.shards.dataset import Dataset


def run(recipe: PretrainRecipe, console: Console | None = None) -> RunResult:
    """Start a run, go on with it, or say that it is finished; under `torchrun` or `srun` every rank calls it.

    Raises:
        RunError: the run folder is another run's or another process trains there, one of its files is damaged, or the
            loss is no longer a number; an `InterruptedRunError`: the run was told to stop, and saved.
        DatasetError, LoadingError: the dataset cannot be opened, or not be trained on with this sequence length.
        CheckpointError: the newest checkpoint is damaged.
        VocabularyError: the checkpoint was trained on another vocabulary.
    """
    claim_folder(recipe)
    if finished := _finished(recipe):
        return finished
    with lost_ranks(), join_ranks(recipe.device, recipe.threads) as ranks, hold_folder(Path(recipe.output), ranks):
        # Again, because whoever held the folder until now may have pinned a version, or finished the run.
        recipe = claim_folder(recipe)
        if finished := _finished(recipe):
            return finished
        dataset = _open_dataset(recipe, ranks)
        recipe = pin_version(recipe, dataset.version)
        index = Index.build(dataset, recipe.data.sequence_length)
        with _train_loader(recipe, index, ranks) as loader:
            return _train(recipe, dataset, loader, _validator(recipe, index, ranks), ranks, console or Console())


def _train(
    recipe: PretrainRecipe, dataset: Dataset, loader: Loader, validator: Validator, ranks: Ranks, console: Console
) -> RunResult:
    folder, vocabulary, total = Path(recipe.output), dataset.vocabulary, recipe.total_steps
    model = build_model(
        model_config(recipe, vocabulary),
        ranks,
        seed=recipe.seed,
        precision=recipe.precision,
        recompute_every=recipe.recompute_every,
        compile_blocks=recipe.compile,
        masters=recipe.masters,
        recompute=recipe.recompute,
    )
    share_codebook_directions(model, vocabulary, recipe.seed)
    optimizer = make_optimizer(model, recipe.optimizer)
    start = _resume(folder, dataset, loader, model, optimizer, ranks)
    if ranks.first:
        write_recipe(recipe)
    baseline = unigram_cross_entropy(dataset.statistics(), validator.counts, vocabulary) if validator.targets else None
    validation: CrossEntropy | None = None
    weights = recipe.loss_weights.model_dump()
    metrics = Metrics(
        folder,
        start=start,
        total_steps=total,
        tokens_per_step=recipe.tokens_per_step,
        settings=recipe.logging,
        console=console,
        enabled=ranks.first,
    )
    with metrics, Interruption(ranks) as interruption:
        metrics.say(_opening(recipe, loader.index, model, start, ranks))
        if baseline and not start:
            metrics.write("baseline", 0, {"loss": baseline.to_json()})
        for step in range(start + 1, total + 1):
            seed_step(recipe.seed, step, ranks.rank)
            with metrics.waiting():
                batch = next(loader)
            losses = forward_backward(model, batch, weights, ranks)
            if _due(step, recipe.logging.every, total):
                metrics.write("telemetry", step, by_modality(model, losses))
            norm = clip_gradients(model, recipe.gradient_clip)
            learning_rate = recipe.optimizer.learning_rate * learning_rate_factor(recipe.schedule, step - 1, total)
            set_learning_rate(optimizer, learning_rate)
            optimizer.step()
            optimizer.zero_grad()
            metrics.step(step, losses, norm, learning_rate)
            if validator.targets and _due(step, recipe.validation.every, total):
                with metrics.pause():
                    validation = validator.evaluate(model)
                    metrics.write("telemetry", step, attention_peaks(model, batch.micro_batches[0], ranks))
                metrics.validation(step, validation, baseline)
            interrupted = interruption.agreed()
            if interrupted or _due(step, recipe.checkpoints.every, total):
                with metrics.pause():
                    state = Checkpoint(
                        step=step,
                        loader=loader.state_dict(),
                        recipe=recipe.model_dump(mode="json"),
                        vocabulary=vocabulary.to_dict(),
                    )
                    save_checkpoint(folder / "checkpoints", state, model, optimizer, ranks)
                    prune_checkpoints(folder / "checkpoints", recipe.checkpoints.keep, ranks)
            if interrupted and step < total:
                interruption.stop(step)
    if validation is None and validator.targets:
        # The run was stopped between its last checkpoint and its end.
        validation = validator.evaluate(model)
    export_model(folder / "model", model, vocabulary, _about(recipe, dataset), ranks)
    result = RunResult(
        folder=folder,
        steps=total,
        resumed_from=start or None,
        already_finished=False,
        validation=validation,
        baseline=baseline,
    )
    if ranks.first:
        write_finished(result)
    dist.barrier()
    return result


def _finished(recipe: PretrainRecipe) -> RunResult | None:
    """What the run came to, if nothing is left to do; a run whose model was deleted has still to export it."""
    finished = read_finished(Path(recipe.output))
    if finished is None or (finished.model / "braid.json").is_file():
        return finished
    if not list_checkpoints(finished.folder / "checkpoints"):
        raise RunError(
            f"{finished.folder}: finished, but its model is gone and no checkpoint is left to export it from; put the "
            f"model back into {finished.model}, or delete the folder {finished.folder} to train again"
        )
    return None


def _due(step: int, every: int, total: int) -> bool:
    return step == total or (every > 0 and step % every == 0)


def _open_dataset(recipe: PretrainRecipe, ranks: Ranks) -> Dataset:
    """The same version on all ranks, also while a job is adding to the dataset."""
    dataset = Dataset.open(recipe.data.dataset, recipe.data.version)
    version = ranks.agree(dataset.version)
    return dataset if dataset.version == version else Dataset.open(recipe.data.dataset, version)


def _train_loader(recipe: PretrainRecipe, index: Index, ranks: Ranks) -> Loader:
    return Loader(
        index.split(validation=False),
        sequences=recipe.batch.sequences,
        micro_batch=recipe.batch.micro_batch,
        seed=recipe.seed,
        window_tokens=recipe.data.window_tokens,
        rank=ranks.rank,
        world_size=ranks.world_size,
        target_sizes=recipe.data.target_sizes,
        prefetch=recipe.data.prefetch,
        pin_memory=ranks.device.type == "cuda",
    )


def _validator(recipe: PretrainRecipe, index: Index, ranks: Ranks) -> Validator:
    sequences = recipe.batch.micro_batch * ranks.world_size
    loader = Loader(
        index.split(validation=True),
        sequences=sequences,
        micro_batch=recipe.batch.micro_batch,
        # Runs of different seeds are compared on the same sequences.
        seed=0,
        window_tokens=recipe.data.window_tokens,
        rank=ranks.rank,
        world_size=ranks.world_size,
        endless=False,
        target_sizes=recipe.data.target_sizes,
        prefetch=0,
    )
    most = None if recipe.validation.sequences is None else -(-recipe.validation.sequences // sequences)
    return Validator(islice(loader, most), index.dataset.vocabulary, ranks)


def _resume(
    folder: Path,
    dataset: Dataset,
    loader: Loader,
    model: ShardedTransformer,
    optimizer: torch.optim.Optimizer,
    ranks: Ranks,
) -> int:
    """Put everything back where the newest checkpoint was; the steps taken until then, 0 without a checkpoint."""
    saved = list_checkpoints(folder / "checkpoints")
    if not saved:
        return 0
    trained_on = Vocabulary.from_dict(read_checkpoint(saved[-1]).vocabulary)
    trained_on.require_same(dataset.vocabulary, this=str(saved[-1]), that=dataset.uri)
    checkpoint = load_checkpoint(saved[-1], model, optimizer, ranks)
    loader.load_state_dict(dict(checkpoint.loader))
    return checkpoint.step


def _opening(recipe: PretrainRecipe, index: Index, model: ShardedTransformer, start: int, ranks: Ranks) -> str:
    begun = f"Going on from step {start:,} of {recipe.total_steps:,}" if start else f"{recipe.total_steps:,} steps"
    backend = model.attention_backend_for(ranks.device, torch.float32 if recipe.precision == "fp32" else torch.bfloat16)
    without = f", {index.duplicates:,} duplicates left out" if index.duplicates else ""
    ranks_used = f"{ranks.world_size} x {ranks.device.type}" if ranks.world_size > 1 else ranks.device.type
    return (
        f"{begun} of {recipe.tokens_per_step:,} tokens, in {recipe.output}\n"
        f"model: {model.config.num_parameters():,} parameters, {recipe.precision} on {ranks_used}, attention by "
        f"{backend}\n"
        f"data: {index.documents:,} documents of {index.tokens:,} tokens to train on, from {index.dataset.uri} version "
        f"{index.dataset.version}{without}"
    )


def _about(recipe: PretrainRecipe, dataset: Dataset) -> dict[str, Any]:
    """What a model's user needs beside its weights."""
    names = dataset.storage.names("recipes")
    tokenized_by = yaml.safe_load(dataset.storage.read(f"recipes/{names[-1]}")) if names else {}
    return {
        "step": recipe.total_steps,
        "tokens": recipe.total_steps * recipe.tokens_per_step,
        "dataset": dataset.uri,
        "dataset_version": dataset.version,
        "tokenizers": tokenized_by.get("tokenizers"),
        "recipe": recipe.model_dump(mode="json"),
    }
