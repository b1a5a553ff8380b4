"""Copies of a run's checkpoints elsewhere, such as in an object store: for machines whose disks go with them.

    MIRROR/step-00000200/state/*, recipe.yaml, metrics.jsonl   and at last
    MIRROR/step-00000200/checkpoint.json                       with the sha256 of every file of the state

Enters: whole checkpoints of the run folder, as they are written. Leaves: the newest of them in a run folder that has none.
Always holds: what has no `checkpoint.json` is no checkpoint, for it is written last and deleted first; the run folder is
where a run goes on, and the mirror is only read where that folder holds nothing; what comes back is verified like any other;
training waits for a mirror that is slow at its end alone, or when it goes back.
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path

import torch.distributed as dist
from rich.console import Console

from pipelines.corpus.errors import StoreError, TransientError
from pipelines.pretrain.checkpoint import NAME, list_checkpoints, path_of, step_of
from pipelines.pretrain.parallelize import Ranks
from pipelines.pretrain.recipe import PretrainRecipe
from pipelines.pretrain.run import RunError
from pipelines.shards.storage import DiskFullError, Storage, naming_a_full_disk, sync

_RECORD = "checkpoint.json"
_BESIDE = ("recipe.yaml", "metrics.jsonl")
"""Files of the run that belong to each checkpoint: without them a run in an empty folder would not be the same one."""

_CHUNK = 2**23


class Mirror:
    """A place that the checkpoints of one run are copied to."""

    def __init__(self, uri: str, run: Path, keep: int, say: Callable[[str], None]) -> None:
        """
        Args:
            uri: a folder or an object store's prefix, of this run alone.
            keep: how many of the newest stay there.
            say: tells people what went wrong.
        """
        self._storage = Storage.of(uri)
        self._run, self._keep, self._say = run, keep, say

    @classmethod
    def of(cls, recipe: PretrainRecipe, say: Callable[[str], None]) -> Mirror | None:
        """The mirror of a run; None if it has none."""
        settings = recipe.checkpoints
        return cls(settings.mirror, Path(recipe.output), settings.keep, say) if settings.mirror else None

    def put(self, checkpoint: Path) -> None:
        """Copy a whole checkpoint; a store that is away is said, and the next one is tried again."""
        try:
            self._put(checkpoint)
            self._prune(step_of(checkpoint))
        except (TransientError, StoreError, DiskFullError, OSError) as error:
            self._say(f"NOT MIRRORED: {checkpoint.name}: {error}. The checkpoint is whole in {checkpoint.parent}.")

    def steps(self) -> list[int]:
        """Of the whole checkpoints there, sorted."""
        whole = (step for step in self._folders() if self._storage.exists(f"{_name(step)}/{_RECORD}"))
        return sorted(whole)

    def prove(self) -> None:
        """Write something there, for a mirror that cannot be written to had better be known before training.

        Raises:
            TransientError, StoreError: the store does not answer, or refuses.
            DiskFullError: the disk is full.
        """
        self._storage.write("README.txt", f"Checkpoints of the run {self._run.name}, copied here by Braid.\n".encode())

    def restore(self) -> Path | None:
        """Fetch the newest checkpoint into a run folder that holds nothing to go on from; None if there is nothing to do.

        Raises:
            TransientError, StoreError: the store does not answer, or refuses.
            DiskFullError: it does not fit.
        """
        folder = self._run / "checkpoints"
        if list_checkpoints(folder) or (self._run / "finished.json").exists() or not (steps := self.steps()):
            return None
        target = path_of(folder, steps[-1])
        partial = folder / f".{target.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "state").mkdir(parents=True)
        there = self._storage.below(target.name)
        for name in json.loads(there.read(_RECORD))["files"]:
            self._fetch(there, name, partial / name)
        for name in _BESIDE:
            if there.exists(name):
                self._fetch(there, name, self._run / name)
        self._fetch(there, _RECORD, partial / _RECORD)
        partial.rename(target)
        sync(folder)
        self._say(f"{target.name} comes from {there.uri}, for {self._run} holds no checkpoint")
        return target

    def _put(self, checkpoint: Path) -> None:
        there = self._storage.below(checkpoint.name)
        # Whatever lies there under this name is not this one: without its record it is no checkpoint any more.
        there.delete(_RECORD)
        for file in sorted((checkpoint / "state").iterdir()):
            there.put(file, f"state/{file.name}")
        for name in _BESIDE:
            if (self._run / name).exists():
                there.put(self._run / name, name)
        there.put(checkpoint / _RECORD, _RECORD)

    def _prune(self, step: int) -> None:
        """Delete all but the newest up to a step; what is later is of a run that went back."""
        kept = [each for each in self.steps() if each <= step][-self._keep :]
        for other in set(self._folders()) - set(kept):
            there = self._storage.below(_name(other))
            # First of all, so that no half of it is ever taken for a checkpoint.
            there.delete(_RECORD)
            there.delete_folder()

    def _folders(self) -> list[int]:
        return sorted(int(match[1]) for match in map(NAME.fullmatch, self._storage.folders()) if match)

    @staticmethod
    def _fetch(there: Storage, name: str, target: Path) -> None:
        partial = target.with_name(f".{target.name}.fetched")
        with naming_a_full_disk(target.parent):
            with there.open(name) as source, partial.open("wb") as copy:
                shutil.copyfileobj(source, copy, _CHUNK)
            sync(partial)
            partial.replace(target)


class Copying:
    """Copies checkpoints while training goes on, on a thread of its own; without a mirror it does nothing."""

    def __init__(self, mirror: Mirror | None, most: int) -> None:
        """
        Args:
            most: how many may wait; where the mirror is slower than the saves, the oldest are left out.
        """
        self._mirror, self._most = mirror, most
        self._lock = threading.Lock()
        self._waiting: list[Path] = []
        self._now: Path | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="braid-mirror")
        self._work: Future[None] | None = None

    def add(self, checkpoint: Path) -> None:
        """Copy this one when those before it are copied."""
        if self._mirror is None:
            return
        with self._lock:
            self._waiting = [*self._waiting, checkpoint][-self._most :]
            if self._now is not None:
                return
            if self._work is not None:
                self._work.result()
            self._now = self._waiting.pop(0)
            self._work = self._thread.submit(self._copy, self._mirror)

    @property
    def steps(self) -> set[int]:
        """Of the checkpoints that must not be deleted yet."""
        with self._lock:
            return {step_of(path) for path in (*self._waiting, self._now) if path is not None}

    def settle(self, ranks: Ranks, alive: Callable[[], None] = lambda: None) -> None:
        """Wait until all is copied; every rank must call it, for none may wait for another longer than a moment.

        Args:
            alive: called now and then meanwhile.
        """
        while ranks.largest(float(self._busy(for_s=1.0)))[0]:
            alive()

    def _busy(self, for_s: float) -> bool:
        """Whether copying goes on after so long."""
        if self._work is not None:
            wait((self._work,), for_s)
            if not self._work.done():
                return True
            self._work.result()
            self._work = None
        return False

    def _copy(self, mirror: Mirror) -> None:
        try:
            while (path := self._now) is not None:
                mirror.put(path)
                with self._lock:
                    self._now = self._waiting.pop(0) if self._waiting else None
        except BaseException:
            with self._lock:
                self._now = None
            raise


def restore(recipe: PretrainRecipe, ranks: Ranks, console: Console) -> None:
    """Put the newest checkpoint of the mirror into a run folder that has none; every rank must call it.

    Raises:
        RunError: it cannot be fetched, on all ranks.
    """
    mirror = Mirror.of(recipe, lambda text: console.print(text, markup=False, highlight=False, soft_wrap=True))
    if mirror is None:
        return
    fault = [""]
    if ranks.first:
        try:
            mirror.prove()
            mirror.restore()
        except (TransientError, StoreError, DiskFullError) as error:
            fault = [f"checkpoints.mirror = {recipe.checkpoints.mirror}: {error}"]
    dist.broadcast_object_list(fault)
    if fault[0]:
        raise RunError(fault[0])


def _name(step: int) -> str:
    return path_of(Path(), step).name
