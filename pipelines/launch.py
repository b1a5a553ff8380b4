"""The two jobs on a cluster: what `--on slurm` does.

Enters: a resolved recipe and a cluster recipe. Leaves: a queued job, or what `--dry-run` shows. Always holds: the job runs
the resolved recipe with the code of this moment, in the directory of this moment; its folder lies in the run's folder, or
in the dataset's, unless the cluster recipe names another place.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.recipe import RecipeError, dump_recipe, read_recipe
from pipelines.shards.storage import Storage
from slurm.settings import ClusterRecipe
from slurm.submission import JobHandle, Task, new_folder, script, submit_many

if TYPE_CHECKING:
    from pipelines.pretrain.recipe import PretrainRecipe
    from pipelines.tokenize.recipe import TokenizeRecipe

CODE = ("model", "pipelines", "slurm", "configs")
"""What the archive of a job holds."""

PREFIX = "slurm."
"""Of overrides that are meant for the cluster recipe."""


def read_cluster(name: str, overrides: Iterable[str]) -> tuple[ClusterRecipe, list[str]]:
    """The cluster recipe, and the overrides that are not its own."""
    ours = [o.removeprefix(PREFIX) for o in overrides if o.startswith(PREFIX)]
    return read_recipe(ClusterRecipe, name, ours), [o for o in overrides if not o.startswith(PREFIX)]


def pretrain_task(recipe: PretrainRecipe) -> Task:
    """The job that trains."""
    return Task(
        target="pipelines.pretrain:main",
        recipe=dump_recipe(recipe),
        name=f"braid-{Path(recipe.output).name}",
        kind="pretrain",
        run=str(Path(recipe.output).absolute()),
        code=CODE,
    )


def tokenize_task(recipe: TokenizeRecipe, arguments: Sequence[str] = ()) -> Task:
    """The job that tokenizes, on a Ray cluster of its own inside the allocation."""
    return Task(
        target="pipelines.tokenize:main",
        recipe=dump_recipe(recipe.anchored()),
        arguments=arguments,
        name=f"braid-{recipe.dataset.rstrip('/').rpartition('/')[2]}",
        kind="tokenize",
        run=Storage.of(recipe.dataset).uri,
        code=CODE,
        ray={},
    )


def launch(
    tasks: Sequence[Task], cluster: ClusterRecipe, *, after: Iterable[str] = (), at_once: int | None = None
) -> JobHandle:
    """Queue jobs: one, or an array of several."""
    return submit_many(tasks, cluster, _folder(tasks[0], cluster), after=after, at_once=at_once)


def show(tasks: Sequence[Task], cluster: ClusterRecipe) -> str:
    """What would be handed to sbatch."""
    return script(tasks[0], cluster, _folder(tasks[0], cluster), tasks=len(tasks))


def _folder(task: Task, cluster: ClusterRecipe) -> Path:
    if cluster.jobs is not None:
        return new_folder(Path(cluster.jobs), task.name)
    storage = Storage.of(task.run)
    if not storage.is_local:
        raise RecipeError(
            f"{task.run} is no folder that a job could keep its files in; name one with slurm.jobs=FOLDER, on a file system "
            "that all nodes share"
        )
    return new_folder(Path(storage.root) / "jobs", task.name)


def sweep(settings: Sequence[str]) -> list[dict[str, str]]:
    """All combinations of `a.b=1,2,3` settings; one empty combination without any.

    Raises:
        RecipeError: one of them is not written like that.
    """
    combinations: list[dict[str, str]] = [{}]
    for setting in settings:
        key, equals, values = setting.partition("=")
        if not equals or not key or not all(values.split(",")):
            raise RecipeError(f"--sweep {setting}: write KEY=VALUE,VALUE, such as optimizer.learning_rate=1e-3,3e-4")
        combinations = [{**c, key: value} for c in combinations for value in values.split(",")]
    return combinations


def swept(recipe: str, overrides: Sequence[str], settings: Sequence[str]) -> list[PretrainRecipe]:
    """The recipes of a sweep, each with a run folder of its own below `output`, named by what is special about it."""
    from pipelines.pretrain.recipe import PretrainRecipe

    recipes = []
    for combination in sweep(settings):
        more = [f"{key}={value}" for key, value in combination.items()]
        made = read_recipe(PretrainRecipe, recipe, [*overrides, *more])
        if combination:
            name = "_".join(f"{key.rpartition('.')[2]}={value}" for key, value in combination.items())
            made = made.model_copy(update={"output": str(Path(made.output) / name)})
        recipes.append(made)
    return recipes


def pretrain_cost(recipes: Sequence[PretrainRecipe], cluster: ClusterRecipe) -> str:
    """What runs need, in some sentences: GPU-hours, memory and bytes, by the plan of each."""
    from pipelines.pretrain.plan import config_of, h200_tflops, make_plan

    gpus = max(1, cluster.nodes * cluster.gpus_per_node)
    hours = memory = size = 0.0
    for recipe in recipes:
        config, vocabularies = config_of(recipe)
        plan = make_plan(recipe, config, gpus=gpus, tflops=h200_tflops(recipe.precision))
        hours, memory = hours + plan.gpu_hours, max(memory, plan.memory_gib)
        # Weights and two moments in fp32; a checkpoint is written before the oldest goes. The exported model is weights.
        size += plan.parameters * (12 * (recipe.checkpoints.keep + 1) + 4)
    most = len(recipes) * cluster.gpu_hours
    allocation = f"{cluster.nodes} nodes of {cluster.gpus_per_node} GPUs for {cluster.time}"
    return (
        f"About {hours:,.2g} GPU-hours on H200s, {memory:,.1f} GiB on each of {gpus}, with {vocabularies}; one start uses at "
        f"most {most:,.1f} GPU-hours ({allocation}).\nAbout {size / 1e9:,.2g} GB on disk: {recipes[0].checkpoints.keep} "
        "checkpoints, one more while it is written, and the model. Nothing was submitted."
    )


def tokenize_workers(recipe: TokenizeRecipe, cluster: ClusterRecipe) -> int:
    """Workers that fit the nodes; of those beside GPUs for sources without media there may be more."""
    settings, groups = recipe.cluster, cluster.all_groups
    cpus = settings.cpus_of_workers((group.cpus, group.gpus_per_node) for group in groups)
    return max(1, sum(group.nodes * settings.places(group.cpus, group.gpus_per_node, cpus) for group in groups))
