"""The recipe of a pipeline: which recipes it runs, when, and what it keeps.

Enters: YAML. Leaves: frozen, validated settings, and the recipes that they name. Always holds: sources, dataset and
tokenizers stand in the tokenize recipe alone, the model in the pretrain recipe alone.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Self

from pydantic import Field, field_validator, model_validator

from pipelines.corpus.remote import is_remote
from pipelines.recipe import RecipeError, Settings, read_recipe, recipe_path

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import PretrainRecipe
    from pipelines.tokenize.recipe import TokenizeRecipe

Modality = Literal["text", "image", "audio"]

Event = Literal["failed", "refused", "lost", "given_up", "recovered", "done"]
"""What alerts may be about: how a run ended, that something is not tried again, that it ended well after it had not."""


class TokenizeStep(Settings):
    recipe: str = Field(min_length=1)
    """A recipe of `braid tokenize`: sources, dataset, tokenizers."""
    overrides: list[str] = Field(default=[])
    """`a.b=value` each; they win over the recipe."""
    new_inputs: int = Field(default=1, ge=1)
    """Wait until so many inputs are new or have changed. What a stopped run has left is always done."""


class PretrainStep(Settings):
    recipe: str = Field(min_length=1)
    """A recipe of `braid pretrain` with `schedule.kind: wsd`. Its dataset, version and length are set by the pipeline."""
    overrides: list[str] = Field(default=[])
    output: str = Field(min_length=1)
    """Folder of the run, to which each stage adds."""
    steps: int | None = Field(default=None, ge=1)
    """Optimizer steps of a stage. Give either this or `tokens`."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of a stage, padding included, rounded up to whole steps."""
    new_documents: int | None = Field(default=None, ge=1)
    """Begin a stage when so many documents have come since the last one began. With `new_tokens`, either is enough; with
    neither, one document is."""
    new_tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("the length of a stage is given by `steps` or by `tokens`: give one of them")
        return self


class EvaluateStep(Settings):
    """Judges the validation loss of each stage; without limits it only records it."""

    at_most: dict[Modality, float] = Field(default={})
    """Nats a token, by modality, over which a model is refused."""
    worse_by: float | None = Field(default=None, ge=0)
    """Nats a token by which a modality may be worse than at the last stage that was not refused."""


class ExportStep(Settings):
    to: str = Field(min_length=1)
    """A folder: each stage's model becomes `stage-0001` in it, and `latest` names the newest."""


class Retention(Settings):
    models: int = Field(default=5, ge=1)
    """Exported models to keep."""
    logs: int = Field(default=100, ge=1)
    """Runs whose steps' logs are kept; their records stay for ever."""
    dataset_versions: int | None = Field(default=None, ge=1)
    """Versions of the dataset to keep, those since the last stage's in any case; null keeps all."""
    orphans_h: float = Field(default=48.0, ge=1)
    """Age at which files that no version names are removed. It must be longer than a tokenize job."""


class Alert(Settings):
    on: list[Event] = Field(default=["failed", "refused", "lost", "given_up", "recovered"], min_length=1)
    command: list[str] | None = Field(default=None, min_length=1)
    """A program with its arguments. It gets the record as JSON on its standard input, and BRAID_PIPELINE, BRAID_EVENT and
    BRAID_TEXT in its environment."""
    webhook: str | None = None
    """An address that takes the same as a POST of JSON, with a line for people under `text`."""
    timeout_s: float = Field(default=30.0, gt=0)

    @field_validator("webhook")
    @classmethod
    def _http(cls, value: str | None) -> str | None:
        if value is not None and not re.match(r"https?://[^/\s]", value):
            raise ValueError("an address begins with http:// or https://")
        return value

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.command is None) == (self.webhook is None):
            raise ValueError("an alert is a `command` or a `webhook`: give one of them")
        return self


class Retries(Settings):
    attempts: int = Field(default=2, ge=1)
    """How often a step is tried within one run."""
    wait_s: float = Field(default=60.0, ge=0)
    """Before each further attempt."""
    runs: int = Field(default=3, ge=1)
    """In how many runs the same work may fail before it is given up: a unit of inputs is then set aside, a step waits until
    its inputs change. `braid pipeline run` tries all of it again."""
    lost_runs: int = Field(default=10, ge=1)
    """The same for runs that ended without a word, as at a power cut."""


class LeaseSettings(Settings):
    ttl_s: float = Field(default=180.0, ge=1)
    """A holder that has not been heard of for so long is taken for dead. Network file systems need some minutes."""
    most_h: float = Field(default=72.0, gt=0)
    """A holder stops after so long, whatever it does, so that a run that hangs cannot keep the others out for ever."""


class Place(Settings):
    """Where a step's job runs."""

    cluster: str = Field(min_length=1)
    """A cluster recipe: a file, or a shipped one such as `cluster/default`."""
    overrides: list[str] = Field(default=[])


class SlurmSettings(Settings):
    """Steps as SLURM jobs, each of which waits for the one before it."""

    tokenize: Place
    """On a Ray cluster of its own, over all nodes of the job."""
    pretrain: Place | None = None
    others: Place
    """Evaluate, export and clean: small things on one node."""

    def place(self, step: str) -> Place:
        found = {"tokenize": self.tokenize, "pretrain": self.pretrain}.get(step, self.others)
        assert found
        return found


class PipelineRecipe(Settings):
    """Everything that decides what a pipeline does."""

    state: str = Field(min_length=1)
    """Folder of records, lease and logs, shared by all machines that tick."""
    tokenize: TokenizeStep
    pretrain: PretrainStep | None = None
    evaluate: EvaluateStep | None = None
    export: ExportStep | None = None
    retention: Retention = Retention()
    alerts: list[Alert] = Field(default=[])
    retries: Retries = Retries()
    lease: LeaseSettings = LeaseSettings()
    slurm: SlurmSettings | None = None
    """null runs the steps where the tick runs."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if is_remote(self.state):
            raise ValueError(
                f"state is {self.state}: a lease needs a file system with hard links; name a folder that all machines share "
                "(NFS, Lustre, GPFS), or a local one"
            )
        if (self.evaluate or self.export) and not self.pretrain:
            raise ValueError("evaluate and export work on what pretrain trains; add pretrain, or leave them out")
        if self.slurm and self.pretrain and not self.slurm.pretrain:
            raise ValueError("slurm.pretrain is missing; say where the pretrain step's job runs")
        return self

    @property
    def steps(self) -> list[str]:
        """The configured steps, in their order; `clean` is always the last."""
        return [name for name in ("tokenize", "pretrain", "evaluate", "export") if getattr(self, name)] + ["clean"]


def pipeline_path(name: str) -> Path:
    """The recipe that a user means: a file, an installed pipeline, or a shipped recipe, with or without `pipeline/`.

    Raises:
        RecipeError: there is none.
    """
    if Path(name).is_file():
        return Path(name)
    # Here, because it asks the schedulers of this machine.
    from pipelines.recurring.entries import installed_recipe

    if recipe := installed_recipe(name):
        return recipe
    for candidate in (f"pipeline/{name}", name):
        try:
            return recipe_path(candidate)
        except RecipeError as error:
            missing = error
    raise missing


def tokenize_recipe(recipe: PipelineRecipe) -> TokenizeRecipe:
    """The recipe of the tokenize step."""
    from pipelines.tokenize.recipe import TokenizeRecipe

    return read_recipe(TokenizeRecipe, recipe.tokenize.recipe, recipe.tokenize.overrides)


def pretrain_recipe(recipe: PipelineRecipe, dataset: str) -> PretrainRecipe | None:
    """The recipe of the first stage; None without a pretrain step.

    Raises:
        RecipeError: it has faults, or its learning rate follows the length of the run.
    """
    # Here, because most ticks have nothing to train.
    from pipelines.pretrain.recipe import PretrainRecipe

    step = recipe.pretrain
    if step is None:
        return None
    length = [f"steps={step.steps or 'null'}", f"tokens={step.tokens or 'null'}"]
    place = [f"output={_quoted(step.output)}", f"data.dataset={_quoted(dataset)}", "data.version=null", "from_step=0"]
    read = read_recipe(PretrainRecipe, step.recipe, [*step.overrides, *length, *place])
    if read.schedule.kind != "wsd":
        raise RecipeError(
            f"{step.recipe}: schedule.kind = {read.schedule.kind}: its rate follows the length of the whole run, and a "
            "pipeline's has no end; set schedule.kind: wsd, there or in pretrain.overrides"
        )
    return read


def _quoted(text: str) -> str:
    """As YAML, whatever it holds."""
    return "'" + text.replace("'", "''") + "'"
