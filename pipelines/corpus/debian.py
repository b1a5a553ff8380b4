"""The files of a Debian package, without installing it.

Enters: a package name. Leaves: a folder with the package's files. Always holds: a package is downloaded and unpacked
once, into a cache; nothing outside the cache is written, and no root rights are needed.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pipelines.corpus.errors import CorpusError

_STALE_LISTS = ("Unable to locate package", "No packages found", "Can't find a source", "404", "Failed to fetch")
"""What apt-get says when its lists are missing or older than the mirror."""


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/braid`, usually `~/.cache/braid`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "braid"


def package(name: str, cache: Path, folder: Path | None = None) -> Path:
    """The unpacked files of a package.

    Args:
        name: such as `tuxpaint-stamps-default`.
        cache: where downloads are unpacked, once.
        folder: take the package from here instead of downloading it: `NAME_VERSION_all.deb`, or unpacked as `NAME`.

    Raises:
        CorpusError: it cannot be had; the message says what to do.
    """
    if folder is not None:
        if (folder / name).is_dir():
            return folder / name
        archives = sorted(folder.glob(f"{name}_*.deb"))
        if not archives:
            raise CorpusError(f"{folder}: holds neither {name}_VERSION_all.deb nor the unpacked package as {name}/")
        return _unpacked(archives[-1], cache)
    if ready := sorted((cache / "packages").glob(f"{name}_*")):
        return ready[-1]
    if shutil.which("apt-get") is None:
        raise CorpusError(
            f"apt-get, with which the Debian package {name} is downloaded, is not on this machine. Download the package "
            "elsewhere and name its folder with --packages DIR: DIR holds the .deb file or, where "
            f"there is no dpkg-deb, its unpacked files as {name}/ (ar x FILE.deb && tar -xf data.tar.*)"
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache, prefix=".download-") as here:
        return _unpacked(_download(name, Path(here), cache / "apt"), cache)


def _download(name: str, into: Path, state: Path) -> Path:
    print(f"Downloading the Debian package {name} (once; it is kept in {into.parent}) ...", flush=True)
    done = _apt_get("download", name, cwd=into)
    said = done.stderr
    if done.returncode and any(sign in done.stderr for sign in _STALE_LISTS):
        print(f"apt-get's package lists do not serve: fetching lists of our own into {state} ...", flush=True)
        for part in ("lists/partial", "cache/archives/partial"):
            (state / part).mkdir(parents=True, exist_ok=True)
        # Lists of our own need no root rights and leave the machine's alone.
        own = ["-o", f"Dir::State::Lists={state / 'lists'}", "-o", f"Dir::Cache={state / 'cache'}"]
        said += _apt_get("update", *own, cwd=into).stderr
        # An update that got some lists and not others may have got the one that matters, so it need not succeed.
        done = _apt_get("download", name, *own, cwd=into)
        said += done.stderr
    archives = list(into.glob(f"{name}_*.deb"))
    if done.returncode or not archives:
        raise CorpusError(
            f"apt-get could not download {name}:\n{said.strip()[-2000:]}\n"
            "Check the network and /etc/apt/sources.list, or name a folder that holds the .deb file with --packages DIR"
        )
    return archives[0]


def _apt_get(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # Root would otherwise download as the user _apt, who may not enter root's cache.
    sandbox = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    return _run(["apt-get", "-qq", *sandbox, *arguments], cwd)


def _unpacked(archive: Path, cache: Path) -> Path:
    """Unpack into the cache, whole or not at all."""
    target = cache / "packages" / archive.stem
    if target.is_dir():
        return target
    if shutil.which("dpkg-deb") is None:
        raise CorpusError(
            f"dpkg-deb, which unpacks {archive}, is not on this machine; unpack it yourself (ar x FILE.deb && tar -xf "
            f"data.tar.*) into a folder named {archive.name.split('_')[0]} in the folder that --packages names"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".unpack-") as here:
        done = _run(["dpkg-deb", "-x", str(archive.absolute()), "files"], Path(here))
        if done.returncode:
            raise CorpusError(f"{archive}: dpkg-deb could not unpack it: {done.stderr.strip()}; download it again")
        Path(here, "files").rename(target)
    return target


def _run(command: Sequence[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    # Messages are read, so they must be English.
    return subprocess.run(
        command,
        cwd=cwd,
        env=os.environ | {"LC_ALL": "C"},
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
