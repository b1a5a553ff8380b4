"""The recipe of a pretraining run.

Enters: YAML. Leaves: frozen, validated settings. Always holds: what a run needs to be repeated stands here, and the
vocabulary sizes of the model come from the dataset alone.
"""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Any, Literal, Self, get_type_hints

from pydantic import Field, create_model, model_validator

from model import MODALITIES, UnifiedTransformerConfig
from pipelines.pretrain.mixture import MixtureSettings
from pipelines.recipe import Settings
from pipelines.sequence import Modality, Vocabulary

_NOT_IN_RECIPES = {f"{name}_vocab_size" for name in MODALITIES} | {"max_sequence_length", "device"}
"""They follow from the dataset, from `data.sequence_length`, and from `device`."""


class DataSettings(MixtureSettings):
    sequence_length: int = Field(default=4096, ge=8)
    """Tokens of a training sequence: documents are packed into it, and it is the context of the model."""
    window_tokens: int = Field(default=16_000_000, ge=1)
    """Tokens of a dataset that are shuffled and packed together, at 5 bytes each in memory, up to three times; more
    shuffle better."""
    target_sizes: int = Field(default=8, ge=1)
    """How many sizes the targets of one head may have; 1 gives one shape, at the price of the largest size always."""
    prefetch: int = Field(default=2, ge=0)
    """Steps made ahead by a thread; 0 makes them when they are needed."""
    workers: int = Field(default=1, ge=0)
    """Threads that read ahead; 0 reads when tokens are needed. A mixture of many datasets gains by more."""


class _ModelSettings(Settings):
    @model_validator(mode="after")
    def _check(self) -> Self:
        # No device is asked for: that would load torch, for which whoever submits a recipe need not wait.
        UnifiedTransformerConfig(**self.model_dump(), device="cpu")
        return self


if TYPE_CHECKING:
    ModelSettings = _ModelSettings
else:
    _types = get_type_hints(UnifiedTransformerConfig)
    # One truth: a hyperparameter of the model is a key of the recipe, with the same name, type and default.
    ModelSettings = create_model(
        "ModelSettings",
        __base__=_ModelSettings,
        **{
            field.name: (_types[field.name], field.default)
            for field in fields(UnifiedTransformerConfig)
            if field.name not in _NOT_IN_RECIPES and field.default is not MISSING
        },
    )


class OptimizerSettings(Settings):
    """AdamW (Loshchilov and Hutter, 2019)."""

    learning_rate: float = Field(default=3e-4, gt=0, allow_inf_nan=False)
    """Its peak; `schedule` shapes it."""
    beta1: float = Field(default=0.9, ge=0, lt=1)
    beta2: float = Field(default=0.95, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.1, ge=0)
    """Of matrices only: not of norms, biases and embeddings."""
    fused: bool = True
    moments: Literal["fp32", "bf16"] = "fp32"
    """What both moments are kept in; bf16 needs `masters: optimizer`."""


class ScheduleSettings(Settings):
    kind: Literal["cosine", "linear", "wsd"] = "cosine"
    """Warmup, and then a cosine or a line for a fixed budget; warmup, stable, decay for one that may grow."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """null is 100, or a tenth of all steps where that is less."""
    decay_steps: int | None = Field(default=None, ge=1)
    """wsd: length of the linear decay at the end; null is a tenth of all steps."""
    minimum: float = Field(default=0.1, ge=0, le=1)
    """Share of the peak at the last step."""

    def warmup(self, total_steps: int) -> int:
        """Steps of the warmup in a run of so many steps."""
        return min(100, total_steps // 10) if self.warmup_steps is None else self.warmup_steps

    def decay(self, total_steps: int) -> int:
        """wsd: steps of the decay in a run of so many steps."""
        return max(1, total_steps // 10) if self.decay_steps is None else self.decay_steps


class BatchSettings(Settings):
    sequences: int = Field(default=64, ge=1)
    """Sequences of an optimizer step, over all ranks."""
    micro_batch: int = Field(default=8, ge=1)
    """Sequences that a rank computes at once; the rest of its share is accumulated."""


class ShardingSettings(Settings):
    """How weights, gradients and moments are spread over ranks. It changes speed and memory, not what is learned."""

    dp_shard: int | None = Field(default=None, ge=1)
    """Ranks that hold one copy of everything together (FSDP); null is all of them. Fewer, as the 8 GPUs of a node, hold as
    many copies as it takes (HSDP): weights then travel within a group, and only gradients between groups."""
    reshard_after_forward: bool = True
    """Give up the gathered weights of a block when its forward pass is done, and gather them again for the backward pass.
    false keeps the whole model in the compute type on each rank, and saves half of what is gathered."""
    reshard_after_backward: bool = True
    """false keeps what is gathered until the last micro-batch of a step; together with `reshard_after_forward: false` weights
    travel once a step."""
    prefetch: int = Field(default=1, ge=1)
    """Blocks gathered ahead of the one that is computed. 1 is enough where a block takes longer than its weights travel."""


class LossWeights(Settings):
    """What a target of each modality counts in the loss."""

    text: float = Field(default=1.0, ge=0)
    image: float = Field(default=1.0, ge=0)
    audio: float = Field(default=1.0, ge=0)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.text + self.image + self.audio:
            raise ValueError("all weights are 0, so there would be nothing to learn; raise one")
        return self


class ValidationSettings(Settings):
    every: int = Field(default=0, ge=0)
    """Steps between validations; 0 validates at the end only."""
    sequences: int | None = Field(default=None, ge=1)
    """At most so many sequences of the validation split, always the same ones; null takes all. They stay in memory."""


class CheckpointSettings(Settings):
    every: int = Field(default=1000, ge=1)
    """Steps between checkpoints; the last step always has one."""
    keep: int = Field(default=2, ge=1)
    """How many of the newest to keep."""
    keep_every: int | None = Field(default=None, ge=1)
    """Keep those of steps that this divides, too."""
    asynchronous: bool = True
    """Write while training goes on, from a copy in host memory."""
    export: bool = False
    """Export the model of every checkpoint to RUN/exports/, too."""
    mirror: str | None = Field(default=None, min_length=1)
    """Copy every checkpoint to this folder or object store, too, the newest `keep` of them; a run folder that holds none goes
    on from there. For machines whose disks go with them. It must be of this run alone."""


class FaultSettings(Settings):
    nonfinite_steps: int = Field(default=3, ge=1)
    """Steps whose loss or gradient is not a number are skipped; so many in a row stop the run."""
    spikes: Literal["record", "skip", "roll_back"] = "record"
    """What is done with a step in which the loss of a modality rises beyond `spike_sigmas` standard deviations of the last
    fifty steps: it is marked in the metrics; skipped, too; or all steps since the last checkpoint are taken anew, with the
    batches that come after it."""
    spike_sigmas: float = Field(default=6.0, gt=0)
    roll_backs: int = Field(default=3, ge=1)
    """Times that a run goes back to the same checkpoint; further spikes are skipped."""
    hang_s: float = Field(default=1800.0, ge=0)
    """A rank that takes longer for a step, a validation or a checkpoint writes down its stacks and ends; 0 waits for ever."""


class LoggingSettings(Settings):
    every: int = Field(default=10, ge=1)
    """Steps between lines on the screen. The JSON lines hold every step."""
    tensorboard: bool = True
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases, too; "offline" writes to RUN/wandb/, for `wandb sync`. Needs the package wandb."""
    peak_tflops: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """What one device could do, for MFU; null takes the datasheet's figure for bf16, if the GPU is known."""


class PretrainRecipe(Settings):
    """Everything that decides what a pretraining run does."""

    output: str
    """Run folder: made if it is not there; the same recipe goes on from its last checkpoint."""
    data: DataSettings
    model: ModelSettings = Field(default_factory=lambda: ModelSettings())
    optimizer: OptimizerSettings = OptimizerSettings()
    schedule: ScheduleSettings = ScheduleSettings()
    batch: BatchSettings = BatchSettings()
    sharding: ShardingSettings = ShardingSettings()
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of the run. Give either this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Token budget, padding included, rounded up to whole steps."""
    from_step: int = Field(default=0, ge=0)
    """Steps that earlier stages of the run in this folder have taken: it goes on from there, with the data in a new order.
    `pipelines.pretrain.stages` sets it; the length of the run counts them."""
    precision: Literal["bf16", "fp32", "float8"] = "bf16"
    """What matrices are multiplied in. float8 is for the blocks alone, without their weight gradients; the rest is bf16."""
    masters: Literal["parameters", "optimizer"] = "parameters"
    """Where the fp32 weights are. "parameters": the model's own, rounded for each product. "optimizer": the model is bf16,
    and the optimizer keeps the other 16 bits of each weight; gradients are still summed in fp32. Saves 4 bytes a weight."""
    recompute: Literal["all", "feed_forward"] = "all"
    """What a block of `recompute_every` computes again: all of it, or the hidden layer of its feed-forward part, which is
    40% of what a block keeps and a ninth of its work. The latter needs fused blocks."""
    recompute_every: int = Field(default=0, ge=0)
    """Activation checkpointing: every n-th block is computed again in the backward pass. 0 is none, 1 all."""
    memory_gib: float | None = Field(default=None, gt=0)
    """In place of `recompute_every`: as few blocks are computed again as keep the plan within so much memory of each rank.
    Leave 2 to 3 GiB of a GPU's for the CUDA context and for pieces that do not fit together."""
    keep: Literal["least", "all"] = "least"
    """What fused blocks keep for the backward pass, unless it is computed again: what their products put out, from which the
    rest is made (6 D + F numbers a token and block, D hidden, F feed-forward), or all (8 D + 2 F), a little faster."""
    tune: bool = False
    """On a GPU, time cuBLASLt's kernels for each matrix product of fused blocks at its first use, half a minute in all, and
    take the fastest. Which one that is may differ between runs, and with it the last bits."""
    compile: bool = False
    """Compile each block with `torch.compile`."""
    gradient_clip: float = Field(default=1.0, gt=0)
    """Largest norm of the gradient."""
    loss_weights: LossWeights = LossWeights()
    seed: int = Field(default=0, ge=0)
    """Of the initial weights, the order of the data and dropout."""
    validation: ValidationSettings = ValidationSettings()
    checkpoints: CheckpointSettings = CheckpointSettings()
    faults: FaultSettings = FaultSettings()
    logging: LoggingSettings = LoggingSettings()
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int | None = Field(default=None, ge=1)
    """CPU threads of each rank; null leaves it to torch."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("the length of the run is given by `steps` or by `tokens`: give one of them")
        if self.batch.sequences % self.batch.micro_batch:
            raise ValueError(
                f"batch.sequences is {self.batch.sequences}: it must be a multiple of batch.micro_batch = "
                f"{self.batch.micro_batch}"
            )
        if self.memory_gib is not None and self.recompute_every:
            raise ValueError(
                f"memory_gib is {self.memory_gib:g}, from which follows what is computed again, but recompute_every is "
                "given, too: leave one of them out"
            )
        if self.masters == "optimizer" and self.precision == "fp32":
            raise ValueError("masters is 'optimizer', which keeps weights in bf16: set precision to bf16 or float8")
        if self.masters == "parameters" and self.optimizer.moments == "bf16":
            raise ValueError("optimizer.moments is 'bf16': set masters to 'optimizer', or moments to 'fp32'")
        if self.faults.spikes == "roll_back" and self.data.all_stages[-1].length(self.tokens_per_step) is not None:
            raise ValueError(
                "faults.spikes is 'roll_back', which passes over batches: leave the length of the last stage of data.stages "
                "out, for it must have more of them"
            )
        if "://" in self.output:
            raise ValueError(
                f"output is {self.output!r}: a run folder must be on a file system, for it is locked while the run goes on, "
                "and checkpoints appear in it by renaming; name a folder that all nodes share. Data may be on an object store"
            )
        total = self.total_steps
        warmup, decay = self.schedule.warmup(total), self.schedule.decay(total)
        if warmup >= total:
            raise ValueError(
                f"schedule.warmup_steps is {warmup} and the run has {total} steps: the warmup must be shorter than the "
                "run; lower it, or leave it out"
            )
        if self.schedule.kind == "wsd" and warmup + decay > total:
            raise ValueError(
                f"schedule.warmup_steps is {warmup} and schedule.decay_steps {decay}: they must fit into the {total} "
                "steps of the run; lower one of them"
            )
        if self.from_step >= total:
            raise ValueError(f"from_step is {self.from_step}, but the run ends with step {total}; lengthen it")
        if self.from_step and self.schedule.kind != "wsd":
            raise ValueError(
                f"schedule.kind is {self.schedule.kind}, whose rate follows the length of the whole run; a run that goes on "
                "by stages needs wsd"
            )
        return self

    @property
    def tokens_per_step(self) -> int:
        """Tokens of an optimizer step, padding included."""
        return self.batch.sequences * self.data.sequence_length

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.steps is not None:
            return self.steps
        assert self.tokens is not None
        return math.ceil(self.tokens / self.tokens_per_step)


def model_config(recipe: PretrainRecipe, vocabulary: Vocabulary) -> UnifiedTransformerConfig:
    """The model that a recipe describes for a dataset; a modality that does not occur gets a vocabulary of one id."""
    values: dict[str, Any] = recipe.model.model_dump()
    values |= {f"{m.label}_vocab_size": max(1, vocabulary.size(m)) for m in Modality}
    return UnifiedTransformerConfig(**values, max_sequence_length=recipe.data.sequence_length)
