"""Training sounds for the audio tokenizer: a folder, a tar or a cache in; random crops on the device out.

Enters: a folder of sound files, a tar of them (streamed, never extracted), or a cache that `Sounds.save` wrote: one
safetensors file of int16 samples, which needs no decoder where it is read. Leaves: `Sounds`, split into training and
held-out clips by a hash of each clip's relative path, so that the split stays when files come or go; and `Strip`, all
training clips end to end on the device, cut at random.
"""

from __future__ import annotations

import hashlib
import os
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
HELD_OUT_SHARE = 0.04
GAP_SECONDS = 0.1
SHORTEST_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Sounds:
    """Decoded clips by relative path, int16 [samples] each."""

    clips: dict[str, np.ndarray]
    sample_rate_hz: int

    @classmethod
    def read(cls, source: Path, sample_rate_hz: int, say: Callable[[str], None] = print) -> Sounds:
        """Read a folder, a `.tar`, or a cache (`.safetensors`).

        Raises:
            FileNotFoundError: nothing there, or no sound in it.
            ValueError: the cache has another sample rate.
        """
        if source.suffix == ".safetensors":
            return cls._from_cache(source, sample_rate_hz)
        from pipelines.corpus.errors import MediaError
        from pipelines.corpus.sounds import load_sound

        def decode(item: tuple[str, bytes]) -> tuple[str, np.ndarray | str]:
            path, data = item
            try:
                waveform = load_sound(data, path, sample_rate_hz)
            except MediaError as fault:
                return path, str(fault)
            return path, np.round(waveform.clip(-1, 1) * 32767).astype(np.int16)

        clips: dict[str, np.ndarray] = {}
        refused: list[str] = []
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            for path, result in pool.map(decode, _files(source)):
                if isinstance(result, str):
                    refused.append(result)
                elif len(result) >= SHORTEST_SECONDS * sample_rate_hz:
                    clips[path] = result
        for message in refused[:5]:
            say(f"left out: {message}")
        if len(refused) > 5:
            say(f"left out: {len(refused) - 5} more")
        if not clips:
            raise FileNotFoundError(
                f"{source}: no sound file ({', '.join(SUFFIXES)}) of {SHORTEST_SECONDS} s or more in it."
            )
        return cls(dict(sorted(clips.items())), sample_rate_hz)

    @classmethod
    def _from_cache(cls, source: Path, sample_rate_hz: int) -> Sounds:
        with safe_open(source, framework="np") as file:
            rate = int((file.metadata() or {}).get("sample_rate_hz", 0))
            if rate != sample_rate_hz:
                raise ValueError(
                    f"{source}: sounds at {rate} Hz, but the tokenizer has {sample_rate_hz} Hz: make the cache anew."
                )
            return cls({path: file.get_tensor(path) for path in sorted(file.keys())}, rate)

    def save(self, cache: Path) -> None:
        """Write the cache: 2 bytes a sample, no decoder needed to read it."""
        tensors = {path: torch.from_numpy(clip) for path, clip in self.clips.items()}
        save_file(tensors, cache, metadata={"sample_rate_hz": str(self.sample_rate_hz)})

    def split(self, held_out_share: float = HELD_OUT_SHARE) -> tuple[list[str], list[str]]:
        """Paths for training and held-out paths, by a hash of the path."""
        held_out = {path for path in self.clips if _fraction(path) < held_out_share}
        return sorted(self.clips.keys() - held_out), sorted(held_out, key=_fraction)

    def waveform(self, path: str) -> np.ndarray:
        """float32 [samples] in [-1, 1]."""
        return self.clips[path].astype(np.float32) / 32767.0

    @property
    def minutes(self) -> float:
        """Of all clips together."""
        return sum(map(len, self.clips.values())) / self.sample_rate_hz / 60


class Strip:
    """Training clips end to end on the device, in shuffled order, with short gaps of silence.

    Crops may cross from one clip into the next: a tokenizer must follow such changes too, and so every crop has its full
    length without padding.

    Args:
        sounds: Holds the clips.
        paths: Training clips.
        length: Samples of a crop.
        device: Where crops are wanted.
        seed: For the order.

    Raises:
        ValueError: the clips together are shorter than one crop.
    """

    def __init__(self, sounds: Sounds, paths: list[str], length: int, device: torch.device, seed: int) -> None:
        order = torch.randperm(len(paths), generator=torch.Generator().manual_seed(seed)).tolist()
        gap = np.zeros(int(GAP_SECONDS * sounds.sample_rate_hz), np.int16)
        pieces = [piece for index in order for piece in (sounds.clips[paths[index]], gap)]
        self.samples = torch.from_numpy(np.concatenate(pieces)).to(device)
        self.within = torch.arange(length, device=device)
        self.starts = len(self.samples) - length
        """Number of places where a crop may start."""
        if self.starts < 1:
            raise ValueError(f"{len(self.samples)} training samples are fewer than one crop of {length}: add sounds.")

    def crops(self, starts: Tensor, gain_db: Tensor) -> Tensor:
        """Crops at the given gains, which are reduced where a peak would exceed 1.

        Args:
            starts: int64 [B], each in [0, `self.starts`).
            gain_db: float32 [B].

        Returns:
            float32 [B, 1, length] in [-1, 1].
        """
        waveforms = self.samples[starts[:, None] + self.within].float() / 32767.0
        peaks = waveforms.abs().amax(dim=1, keepdim=True).clamp_min(1e-4)
        return (waveforms * torch.minimum(10.0 ** (gain_db[:, None] / 20.0), 1.0 / peaks))[:, None]


def _files(source: Path) -> Iterator[tuple[str, bytes]]:
    if source.is_dir():
        for path in sorted(source.rglob("*")):
            if path.suffix.lower() in SUFFIXES:
                yield path.relative_to(source).as_posix(), path.read_bytes()
    elif source.is_file() and tarfile.is_tarfile(source):
        with tarfile.open(source, "r|*") as tar:
            for member in tar:
                if member.isfile() and member.name.lower().endswith(SUFFIXES):
                    file = tar.extractfile(member)
                    assert file is not None
                    yield member.name, file.read()
    else:
        raise FileNotFoundError(f"{source}: neither a folder, nor a tar, nor a .safetensors cache of sounds.")


def _fraction(path: str) -> float:
    return int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") / 2**64
