"""Sound to codes and back with EnCodec: a causal convolutional codec with residual vector quantization.

Enters: mono float32 waveforms at the tokenizer's sample rate (`pipelines.corpus.sounds` makes them). Leaves: int32 codes
[frames, K], frame by frame, codebook 0 first. Always holds: a clip of n samples has ceil(n / hop) frames, and its codes do
not depend on the clips encoded beside it.

Reproducibility: float arithmetic groups differently in differently shaped batches, which flips a few codes in a thousand
where two entries are nearly as close. So in float32 the shape in which a clip is computed depends on that clip alone: on the
CPU a batch of one, on an accelerator always `batch_size` rows of the clip's own length bucket, unused rows silent. The
other dtypes, for CUDA devices, have kernels whose sums run in one order whatever the batch (`encodec_fast`). Codes repeat
exactly on one device class with one thread count; between device classes and dtypes a fraction of a percent differs, and
`agreement` measures it.

Source: High Fidelity Neural Audio Compression (Défossez et al., 2022), section 3; package encodec 0.1.1.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from pipelines.sequence import VocabularyError
from pipelines.tokenizers.audio_config import AudioTokenizerConfig
from pipelines.tokenizers.checkpoint import (
    checkpoint_sha256,
    read_config,
    read_weights,
    resolve,
    write_checkpoint,
)
from pipelines.tokenizers.clip_batches import ClipBatches
from pipelines.tokenizers.encodec_network import EncodecNetwork

# Shapes: B batch, K codebooks, F frames, D latent dimension.

AudioDtype = Literal["float32", "float16x2", "float16"]
"""How encoding computes: as the package does, with each number as the sum of two float16 ones, or as one of them."""
BATCH_SIZES: dict[AudioDtype, int] = {"float32": 16, "float16x2": 256, "float16": 256}
"""Clips in every batch on an accelerator, if nobody says otherwise."""
BUCKET_FRAMES = 64
"""Clips on an accelerator are padded to a multiple of this many frames; the padding's codes are dropped."""


class AudioTokenizer:
    """An EnCodec model ready to encode and decode, or a view of its first codebooks.

    Args:
        network: On the CPU or already on `device`.
        name: What cards, errors and datasets call it.
        sha256: Identity of the checkpoint; a view has its checkpoint's.
        n_q: Use the first `n_q` codebooks; all when None.
        device: Where to compute.
        dtype: Of encoding; decoding is float32 always. On an H200, "float16x2" is some 7 times as fast as "float32" and
            agrees with it on all but some codes in ten thousand; "float16" is twice as fast again, and differs in up to
            some in a hundred, as the weights have it.
        batch_size: Clips that an accelerator encodes at a time. In float32 it is part of what fixes the codes.

    Raises:
        ValueError: `n_q` exceeds the checkpoint's codebooks, or the dtype is unknown or not for this device or network.
    """

    def __init__(
        self,
        network: EncodecNetwork,
        *,
        name: str,
        sha256: str,
        n_q: int | None = None,
        device: str | torch.device = "cpu",
        dtype: AudioDtype = "float32",
        batch_size: int | None = None,
    ) -> None:
        if dtype not in BATCH_SIZES or (batch_size is not None and batch_size < 1):
            raise ValueError(
                f"an audio tokenizer takes the dtypes {', '.join(BATCH_SIZES)} and a positive batch size, "
                f"found {dtype} and {batch_size}."
            )
        self.config = network.config
        self.least_n_q = 1 + self.config.normalize
        """Codebooks without which nothing can be heard; loudness alone is no sound."""
        if n_q is not None and not self.least_n_q <= n_q <= network.config.n_q:
            raise ValueError(
                f"n_q is {n_q}, but the audio tokenizer {name} has {self.least_n_q} to {network.config.n_q} codebooks."
            )
        self.name = name
        self.sha256 = sha256
        self.n_q = n_q or network.config.n_q
        self.device = torch.device(device)
        self.network = network.to(self.device).eval().requires_grad_(False)
        self.dtype = dtype
        self.batch_size = batch_size or BATCH_SIZES[dtype]
        self._fast = None if dtype == "float32" else self._fast_encoder()

    @classmethod
    def load(
        cls,
        folder_or_shipped_name: str | Path,
        n_q: int | None = None,
        device: str | torch.device = "cpu",
        dtype: AudioDtype = "float32",
        batch_size: int | None = None,
    ) -> AudioTokenizer:
        """Load a tokenizer's folder, or one that comes with Braid by its name; the settings are the class's own.

        Raises:
            CheckpointError: nothing there, or not an audio tokenizer.
            ValueError: a setting that this tokenizer or device does not have.
        """
        folder = resolve(folder_or_shipped_name)
        network = EncodecNetwork(AudioTokenizerConfig.from_json(read_config(folder, "audio"), str(folder)))
        network.load_weights(read_weights(folder), str(folder))
        return cls(
            network, name=folder.name, sha256=checkpoint_sha256(folder), n_q=n_q, device=device, dtype=dtype,
            batch_size=batch_size,
        )  # fmt: skip

    def save(self, folder: Path, dtype: torch.dtype = torch.float32) -> Path:
        """Write `config.json` and `weights.safetensors`; all codebooks, also from a view."""
        config = {"kind": "audio", **asdict(self.config), "ratios": list(self.config.ratios)}
        return write_checkpoint(folder, config, self.network.weights(), dtype)

    @property
    def sample_rate_hz(self) -> int:
        """Of the waveforms on both sides."""
        return self.config.sample_rate_hz

    @property
    def hop(self) -> int:
        """Samples a frame."""
        return self.config.hop

    @property
    def frame_rate_hz(self) -> float:
        """Frames a second."""
        return self.config.sample_rate_hz / self.config.hop

    @property
    def codebook_size(self) -> int:
        """Entries of each codebook."""
        return self.config.codebook_size

    def frames(self, samples: int) -> int:
        """Frames of a clip of that many samples."""
        return -(-samples // self.hop)

    def encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Encode clips; each clip's codes are the same whatever its neighbours.

        Args:
            waveforms: float32 [samples] each, at `sample_rate_hz`, nominally in [-1, 1], at least one sample.

        Returns:
            int32 [frames, n_q] each, values in [0, codebook_size); the last frame is completed with silence.

        Raises:
            ValueError: a waveform that is not one-dimensional, or empty; the message names which.
            FloatingPointError: a waveform whose activations the dtype cannot hold.
        """
        return self.start(waveforms)()

    @torch.inference_mode()
    def start(self, waveforms: Sequence[np.ndarray]) -> Callable[[], list[np.ndarray]]:
        """Begin to encode clips; what is returned waits for their codes: see `encode`.

        In float16 and float16x2, whoever starts the next clips before asking for these codes keeps the GPU busy between
        the two.
        """
        cut = self._segmented(waveforms)
        pieces, counts = list(chain.from_iterable(cut)), list(map(len, cut))
        if self._fast:
            return partial(self._landed, counts, self._fast.start(pieces))
        codes = self._encode(pieces)
        return lambda: _joined(counts, codes)

    @torch.inference_mode()
    def stage(self, waveforms: Sequence[np.ndarray]) -> Callable[[], Callable[[], list[np.ndarray]]]:
        """Copy clips to where a GPU fetches them from; what is returned begins to encode them, once: see `start`.

        Only float16 and float16x2 copy anything, all clips at once. Another thread may do this for the next clips while
        one begins to encode these.
        """
        if not self._fast:
            return partial(self.start, waveforms)
        cut = self._segmented(waveforms)
        start, counts = self._fast.stage(list(chain.from_iterable(cut))), list(map(len, cut))

        @torch.inference_mode()
        def begin() -> Callable[[], list[np.ndarray]]:
            return partial(self._landed, counts, start())

        return begin

    def _segmented(self, waveforms: Sequence[np.ndarray]) -> list[list[np.ndarray]]:
        for index, waveform in enumerate(waveforms):
            if waveform.ndim != 1 or not len(waveform):
                raise ValueError(
                    f"waveform {index} has shape {list(waveform.shape)}: give mono float32 [samples], at least one sample."
                )
        return self._segments(waveforms, self.hop)

    def _landed(self, counts: list[int], pending: Callable[[], list[np.ndarray]]) -> list[np.ndarray]:
        return _joined(counts, self._representable(pending()))

    def agreement(self, reference: AudioTokenizer, waveforms: Sequence[np.ndarray]) -> np.ndarray:
        """Share of the codes of clips that equal those of `reference`, the same tokenizer in float32, say.

        Returns:
            float64 [n_q], by codebook; a code that differs changes all that follow in its frame.
        """
        ours, theirs = (np.concatenate(tokenizer.encode(waveforms)) for tokenizer in (self, reference))
        return np.asarray((ours == theirs[:, : self.n_q]).mean(axis=0))

    def _fast_encoder(self) -> ClipBatches:
        if self.device.type != "cuda":
            raise ValueError(f"dtype {self.dtype} is for CUDA devices, and this is {self.device}: use float32.")
        # Triton comes with torch for CUDA, and with no other.
        from pipelines.tokenizers.encodec_fast import FastEncoder

        encoder = FastEncoder(self.network, split=self.dtype == "float16x2", device=self.device)
        return ClipBatches(
            lambda rows: encoder.encode(rows, self.n_q),
            hop=self.hop,
            least_frames=BUCKET_FRAMES,
            batch_size=self.batch_size,
            device=self.device,
        )

    def _representable(self, codes: list[np.ndarray]) -> list[np.ndarray]:
        for index, clip in enumerate(codes):
            if clip.min() < 0:
                raise FloatingPointError(
                    f"waveform {index} of {len(codes)}: {self.name} computes numbers that {self.dtype} cannot hold, or the "
                    "waveform is not finite; load the tokenizer with float32."
                )
        return codes

    def _encode(self, waveforms: Sequence[np.ndarray]) -> list[np.ndarray]:
        codes: list[np.ndarray] = [np.empty(0)] * len(waveforms)
        for indices, frames in self._batches([self.frames(len(waveform)) for waveform in waveforms]):
            rows = torch.zeros(self._rows, 1, frames * self.hop)
            for row, index in enumerate(indices):
                rows[row, 0, : len(waveforms[index])] = torch.from_numpy(
                    np.ascontiguousarray(waveforms[index], np.float32)
                )
            with _exact_convolutions():
                encoded = self.network.encode(rows.to(self.device), self.n_q).to(torch.int32).cpu().numpy()
            for row, index in enumerate(indices):
                codes[index] = np.ascontiguousarray(encoded[row, :, : self.frames(len(waveforms[index]))].T)
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Reconstruct one clip.

        Args:
            codes: integers [frames, K], K from `least_n_q` to `n_q`: the first codebooks alone give a coarser sound.

        Returns:
            float32 [frames * hop] at `sample_rate_hz`, nominally in [-1, 1].

        Raises:
            VocabularyError: another shape, or a code outside its codebook; the message names codebook, frame and value.
        """
        return self.decode_batch([codes])[0]

    @torch.inference_mode()
    def decode_batch(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Reconstruct clips that have the same number of codebooks; see `decode`."""
        for codes in clips:
            self._check(codes)
        depths = sorted({codes.shape[1] for codes in clips})
        if len(depths) > 1:
            raise VocabularyError(f"clips of one batch have {depths} codebooks: decode clips of equal depth together.")
        cut = self._segments(clips, 1)
        return _joined(list(map(len, cut)), self._decode(list(chain.from_iterable(cut))))

    def _decode(self, clips: Sequence[np.ndarray]) -> list[np.ndarray]:
        waveforms: list[np.ndarray] = [np.empty(0)] * len(clips)
        for indices, frames in self._batches([len(codes) for codes in clips]):
            rows = torch.zeros(self._rows, clips[0].shape[1], frames, dtype=torch.int64)
            for row, index in enumerate(indices):
                rows[row, :, : len(clips[index])] = torch.from_numpy(clips[index].astype(np.int64).T)
            with _exact_convolutions():
                decoded = self.network.decode(rows.to(self.device)).float().cpu().numpy()
            for row, index in enumerate(indices):
                waveforms[index] = decoded[row, 0, : len(clips[index]) * self.hop].copy()
        return waveforms

    def _segments(self, clips: Sequence[np.ndarray], frame: int) -> list[list[np.ndarray]]:
        """Each clip, of which `frame` entries are one frame, cut into the model's own segments."""
        if self.config.segment_frames is None:
            return [[clip] for clip in clips]
        length = self.config.segment_frames * frame
        return [[clip[start : start + length] for start in range(0, len(clip), length)] for clip in clips]

    @property
    def _rows(self) -> int:
        return 1 if self.device.type == "cpu" else self.batch_size

    def _batches(self, frames: Sequence[int]) -> Iterator[tuple[list[int], int]]:
        """Groups of clips to compute together, with the frames to pad them to: (indices, frames)."""
        if self.device.type == "cpu":
            yield from (([index], count) for index, count in enumerate(frames))
            return
        bucket = BUCKET_FRAMES if self.config.bears_padding else 1
        buckets: dict[int, list[int]] = {}
        for index, count in enumerate(frames):
            buckets.setdefault(-(-count // bucket) * bucket, []).append(index)
        for length, indices in sorted(buckets.items()):
            yield from ((indices[start : start + self._rows], length) for start in range(0, len(indices), self._rows))

    def _check(self, codes: np.ndarray) -> None:
        if codes.ndim != 2 or not len(codes) or not self.least_n_q <= codes.shape[1] <= self.n_q:
            raise VocabularyError(
                f"codes have shape {list(codes.shape)}, but {self.name} decodes [frames, K] with at least one frame "
                f"and K from {self.least_n_q} to {self.n_q}."
            )
        outside = (codes < 0) | (codes >= self.codebook_size)
        if outside.any():
            frame, codebook = np.argwhere(outside)[0]
            raise VocabularyError(
                f"code {codes[frame, codebook]} of codebook {codebook} in frame {frame} lies outside "
                f"[0, {self.codebook_size}) of {self.name}; {int(outside.sum())} such codes in all. Audio ids are "
                f"code + codebook * {self.codebook_size}: subtract the codebook's offset first."
            )


def _joined(counts: list[int], pieces: list[np.ndarray]) -> list[np.ndarray]:
    """What became of the pieces of each clip, so many of each, as one array a clip."""
    done = iter(pieces)
    parts = [list(islice(done, count)) for count in counts]
    return [part[0] if len(part) == 1 else np.concatenate(part) for part in parts]


def record_agreement(folder: Path, dtype: AudioDtype, shares: np.ndarray, *, over: str, hardware: str) -> None:
    """Write into a tokenizer's `card.json` what `AudioTokenizer.agreement` found for a dtype, over what and where."""
    path = folder / "card.json"
    card = json.loads(path.read_text(encoding="utf-8"))
    by_codebook = [round(float(share), 5) for share in shares]
    found = {"equal": round(float(shares.mean()), 5), "by_codebook": by_codebook, "over": over, "hardware": hardware}
    card["agreement"] = card.get("agreement", {}) | {dtype: found}
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _exact_convolutions() -> Iterator[None]:
    """float32 as on the CPU: cuDNN would round to TF32, and would choose an algorithm by timing."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield
