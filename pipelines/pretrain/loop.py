"""The training loop: next batch, forward and backward, clip, step, log, save.

Enters: a `PretrainRecipe`. Leaves: a run folder with metrics, checkpoints and the trained model. Always holds: a call that
is killed at any moment and made again ends with what an undisturbed one ends with, in fp32 on the CPU bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml
from rich.console import Console

from pipelines.loading import Loader
from pipelines.pretrain.baseline import unigram_cross_entropy
from pipelines.pretrain.boards import require_boards
from pipelines.pretrain.by_dataset import Datasets
from pipelines.pretrain.checkpoint import (
    Checkpoint,
    DamagedCheckpointError,
    list_checkpoints,
    load_checkpoint,
    read_checkpoint,
    set_aside,
    step_of,
)
from pipelines.pretrain.data import RunData, make_validator, open_data, train_loader
from pipelines.pretrain.export import export_checkpoint, export_model
from pipelines.pretrain.faults import Guard, Watchdog, stacks_left, take_step
from pipelines.pretrain.initialization import share_codebook_directions
from pipelines.pretrain.interruption import Interruption, lost_ranks
from pipelines.pretrain.metrics import SAVE, Metrics
from pipelines.pretrain.mfu import peak_of
from pipelines.pretrain.mirror import Copying, Mirror, restore
from pipelines.pretrain.optimizer import make_optimizer, set_learning_rate
from pipelines.pretrain.parallelize import Ranks, ShardedTransformer, join_ranks, model_of
from pipelines.pretrain.plan import make_plan
from pipelines.pretrain.recipe import PretrainRecipe, model_config
from pipelines.pretrain.roll_back import RollBack, target_of
from pipelines.pretrain.run import (
    RunError,
    RunResult,
    claim_folder,
    hold_folder,
    read_finished,
    write_finished,
    write_recipe,
)
from pipelines.pretrain.saving import Saver
from pipelines.pretrain.schedule import learning_rate_factor
from pipelines.pretrain.stages import data_seed, require_stage_start
from pipelines.pretrain.step import clip_gradients, forward_backward, seed_step
from pipelines.pretrain.telemetry import attention_peaks, by_modality
from pipelines.pretrain.validate import CrossEntropy, Validator
from pipelines.sequence import Vocabulary

Tokenizers = dict[str, Any] | None
"""The settings of a tokenize recipe."""


def run(recipe: PretrainRecipe, console: Console | None = None) -> RunResult:
    """Start a run, go on with it, or say that it is finished; under `torchrun` or `srun` every rank calls it.

    Raises:
        RunError: the run folder is another run's or another process trains there, one of its files is damaged, or the
            loss is no longer a number; an `InterruptedRunError`: the run was told to stop, and saved.
        DatasetError, LoadingError: the dataset cannot be opened, or not be trained on with this sequence length.
        CheckpointError: the newest checkpoint is damaged.
        VocabularyError: the checkpoint was trained on another vocabulary.
    """
    require_boards(recipe.logging)
    claim_folder(recipe)
    if finished := _finished(recipe):
        return finished
    with (
        lost_ranks(),
        join_ranks(recipe.device, recipe.threads, recipe.faults.hang_s) as ranks,
        hold_folder(Path(recipe.output), ranks),
    ):
        restore(recipe, ranks, console or Console())
        # Again, because whoever held the folder until now may have pinned a version, or finished the run.
        recipe = claim_folder(recipe)
        if finished := _finished(recipe):
            return finished
        data = open_data(recipe, ranks)
        recipe = data.recipe
        with train_loader(data, ranks, data_seed(recipe)) as loader:
            return _train(recipe, data, loader, make_validator(data, ranks), ranks, console or Console())


def _train(
    recipe: PretrainRecipe, data: RunData, loader: Loader, validator: Validator, ranks: Ranks, console: Console
) -> RunResult:
    folder, vocabulary, total = Path(recipe.output), data.vocabulary, recipe.total_steps
    tokenizers = _tokenizers(recipe, data)
    model = model_of(recipe, model_config(recipe, vocabulary), ranks)
    if ranks.first and recipe.memory_gib is not None:
        again = sum(block.recompute != "none" for block in model.blocks)
        told = f"memory_gib = {recipe.memory_gib:g}: {again} of {len(model.blocks)} blocks are computed again"
        console.print(told, highlight=False)
    share_codebook_directions(model, vocabulary, recipe.seed)
    optimizer = make_optimizer(model, recipe.optimizer)
    guard = Guard(recipe.faults, ranks.device)
    start = _resume(recipe, data, loader, model, optimizer, guard, ranks, console)
    if ranks.first:
        for path in stacks_left(folder):
            console.print(f"THE RUN BEFORE HUNG: see the stacks in {path}", style="bold red", soft_wrap=True)
        write_recipe(recipe)
    baseline = unigram_cross_entropy(data.statistics(), validator.counts, vocabulary) if validator.targets else None
    validation: CrossEntropy | None = None
    weights = recipe.loss_weights.model_dump()
    datasets = Datasets(loader.names)
    metrics = _metrics(recipe, model, start, datasets, ranks, console)
    goes_back = recipe.faults.spikes == "roll_back"
    saver = Saver(
        folder / "checkpoints",
        recipe.checkpoints,
        ranks,
        metrics.say,
        Copying(Mirror.of(recipe, metrics.say) if ranks.first else None, recipe.checkpoints.keep),
        _exporter(recipe, data, tokenizers) if recipe.checkpoints.export else None,
        protected=lambda step: {target_of(recipe, step + 1)} if goes_back else set(),
    )
    roll_back = RollBack(
        recipe,
        loader=loader,
        model=model,
        optimizer=optimizer,
        guard=guard,
        saver=saver,
        metrics=metrics,
        ranks=ranks,
    )
    with (
        Watchdog(folder, recipe.faults, ranks.rank) as watchdog,
        metrics,
        Interruption(ranks) as interruption,
        saver,
    ):
        metrics.say(_opening(recipe, loader, model, start, ranks))
        if baseline and start == recipe.from_step:
            metrics.write("baseline", start, {"loss": baseline.to_json()})
        step = start
        while step < total:
            step += 1
            seed_step(recipe.seed, step, ranks.rank)
            with metrics.waiting():
                batch = next(loader)
            losses = forward_backward(
                model, batch, weights, ranks, datasets, reshard_after_backward=recipe.sharding.reshard_after_backward
            )
            if _due(step, recipe.logging.every, total):
                metrics.write("telemetry", step, by_modality(model, losses))
            norm = clip_gradients(model, recipe.gradient_clip)
            learning_rate = recipe.optimizer.learning_rate * learning_rate_factor(recipe.schedule, step - 1, total)
            set_learning_rate(optimizer, learning_rate)
            verdict = guard.check(losses, norm)
            take_step(optimizer, verdict)
            optimizer.zero_grad()
            metrics.step(step, losses, norm, learning_rate, verdict)
            roll_back.taken(step)
            if saver.unprepared:
                with metrics.pause():
                    saver.prepare(model, optimizer)
            watchdog.alive()
            validating = validator.targets > 0 and _due(step, recipe.validation.every, total)
            saving = _due(step, recipe.checkpoints.every, total)
            if (target := roll_back.due(ask=validating or saving)) is not None:
                step = target
                watchdog.alive()
                continue
            if validating:
                with metrics.pause():
                    validation = validator.evaluate(model)
                    metrics.write("telemetry", step, attention_peaks(model, batch.micro_batches[0], ranks))
                metrics.validation(step, validation, baseline, validator.by_dataset)
                watchdog.alive()
            interrupted = interruption.agreed()
            if interrupted and (target := roll_back.due(ask=True)) is not None:
                # One step more, and then there is something to save.
                step = target
                watchdog.alive()
                continue
            if interrupted or saving:
                if saving:
                    # From here on, this is what a spike goes back to.
                    guard.roll_backs = 0
                with metrics.pause() as pause:
                    state = Checkpoint(
                        step=step,
                        loader=loader.state_dict(),
                        recipe=recipe.model_dump(mode="json"),
                        vocabulary=vocabulary.to_dict(),
                        guard=guard.state_dict(),
                        tokenizers=tokenizers,
                    )
                    waited = saver.save(state, model, optimizer)
                    if interrupted:
                        saver.settle(last=True, alive=watchdog.alive)
                paused, waited = ranks.largest(pause.seconds, waited)
                metrics.write(SAVE, step, {"pause_s": paused, "waited_s": waited})
                watchdog.alive()
            if interrupted and step < total:
                interruption.stop(step)
        saver.settle(last=True, alive=watchdog.alive)
    if validation is None and validator.targets:
        # The run was stopped between its last checkpoint and its end.
        validation = validator.evaluate(model)
    export_model(folder / "model", model, vocabulary, _about(recipe, data, tokenizers), ranks)
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


def _metrics(
    recipe: PretrainRecipe, model: ShardedTransformer, start: int, datasets: Datasets, ranks: Ranks, console: Console
) -> Metrics:
    peak = recipe.logging.peak_tflops or peak_of(ranks.device, recipe.precision)
    return Metrics(
        recipe,
        start=start,
        datasets=datasets,
        device=ranks.device,
        flops_per_token=make_plan(recipe, model.config, gpus=ranks.world_size).flops_per_token,
        peak_tflops=peak * ranks.world_size if peak else None,
        console=console,
        enabled=ranks.first,
    )


def _finished(recipe: PretrainRecipe) -> RunResult | None:
    """What the run came to, if nothing is left to do; a run whose model was deleted has still to export it."""
    finished = read_finished(Path(recipe.output))
    if finished and finished.steps <= recipe.from_step:
        return None
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


def _resume(
    recipe: PretrainRecipe,
    data: RunData,
    loader: Loader,
    model: ShardedTransformer,
    optimizer: torch.optim.Optimizer,
    guard: Guard,
    ranks: Ranks,
    console: Console,
) -> int:
    """Put everything back where the newest whole checkpoint was; the steps taken until then, 0 without a checkpoint.

    Raises:
        CheckpointError: there are checkpoints, but none of them is whole.
        StageError: the checkpoint that this stage goes on from is gone, or damaged.
    """
    saved = list_checkpoints(Path(recipe.output) / "checkpoints")
    require_stage_start(recipe, saved)
    damaged: list[tuple[Path, DamagedCheckpointError]] = []
    for path in reversed(saved):
        try:
            require_stage_start(recipe, [path])
            trained_on = Vocabulary.from_dict(read_checkpoint(path).vocabulary)
            trained_on.require_same(data.vocabulary, this=str(path), that=data.first.uri)
            checkpoint = load_checkpoint(path, model, optimizer, ranks)
        except DamagedCheckpointError as error:
            damaged.append((path, error))
            continue
        for bad, fault in damaged if ranks.first else ():
            console.print(
                f"DAMAGED CHECKPOINT: {fault}. It was moved to {set_aside(bad)}, and the run goes on from {path.name}.",
                style="bold red",
                markup=False,
                soft_wrap=True,
            )
        guard.load_state_dict(checkpoint.guard)
        if checkpoint.step != recipe.from_step:
            # A stage begins with data of its own.
            loader.load_state_dict(dict(checkpoint.loader))
        return checkpoint.step
    if damaged:
        # Starting over would throw away what took days, so that is for a person to decide.
        raise damaged[0][1]
    return 0


def _opening(recipe: PretrainRecipe, loader: Loader, model: ShardedTransformer, start: int, ranks: Ranks) -> str:
    begun = f"Going on from step {start:,} of {recipe.total_steps:,}" if start else f"{recipe.total_steps:,} steps"
    backend = model.attention_backend_for(ranks.device, torch.float32 if recipe.precision == "fp32" else torch.bfloat16)
    ranks_used = f"{ranks.world_size} x {ranks.device.type}" if ranks.world_size > 1 else ranks.device.type
    lines = [
        f"{begun} of {recipe.tokens_per_step:,} tokens, in {recipe.output}",
        f"model: {model.config.num_parameters():,} parameters, {recipe.precision} on {ranks_used}, attention by {backend}",
    ]
    for number, stage in enumerate(loader.stages, start=1):
        of = f"stage {number}, " if len(loader.stages) > 1 else ""
        total = sum(component.weight for component in stage.components)
        for component in stage.components:
            index = component.index
            share = f"{component.weight / total:.1%} from " if len(stage.components) > 1 else ""
            without = f", {index.duplicates:,} duplicates left out" if index.duplicates else ""
            lines.append(
                f"data: {of}{share}{index.documents:,} documents of {index.tokens:,} tokens to train on, from "
                f"{index.dataset.uri} version {index.dataset.version}{without}"
            )
    return "\n".join(lines)


def _exporter(recipe: PretrainRecipe, data: RunData, tokenizers: Tokenizers) -> Callable[[Path], None]:
    """Exports the model of a checkpoint, beside those of others."""

    def export(checkpoint: Path) -> None:
        about = _about(recipe, data, tokenizers)
        step = step_of(checkpoint)
        about |= {"step": step, "tokens": step * recipe.tokens_per_step}
        export_checkpoint(checkpoint, Path(recipe.output) / "exports" / checkpoint.name, about)

    return export


def _about(recipe: PretrainRecipe, data: RunData, tokenizers: Tokenizers) -> dict[str, Any]:
    """What a model's user needs beside its weights."""
    return {
        "step": recipe.total_steps,
        "tokens": recipe.total_steps * recipe.tokens_per_step,
        "dataset": data.first.uri,
        "dataset_version": data.first.version,
        "datasets": [{"dataset": d.uri, "version": d.version} for d in data.datasets],
        "tokenizers": tokenizers,
        "recipe": recipe.model_dump(mode="json"),
    }


def _tokenizers(recipe: PretrainRecipe, data: RunData) -> Tokenizers:
    """Those of the first dataset's newest recipe, with the codebooks that are trained on."""
    storage = data.first.storage
    names = storage.names("recipes")
    tokenizers: Tokenizers = yaml.safe_load(storage.read(f"recipes/{names[-1]}")).get("tokenizers") if names else None
    if tokenizers and recipe.data.audio_codebooks:
        tokenizers["audio"]["n_q"] = recipe.data.audio_codebooks
    return tokenizers
