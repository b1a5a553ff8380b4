"""Sound: the whole job against the bare tokenizer loop: `python -m benchmarks.audio_job`.

The shipped tokenizer `speech` on Asterisk's English prompts; media_job.py says what is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.media_job import run
from pipelines.corpus.sounds import load_sound
from pipelines.sequence import Modality
from pipelines.tokenizers.encodec import AudioTokenizer

RATE_HZ = 16_000
CODEBOOKS, CODEBOOK_SIZE = 4, 1024


def decode(data: bytes, name: str) -> np.ndarray:
    return load_sound(data, name, RATE_HZ)


def load() -> Callable[[np.ndarray], np.ndarray]:
    tokenizer = AudioTokenizer.load("speech", n_q=CODEBOOKS)
    offsets = np.arange(CODEBOOKS, dtype=np.int32) * CODEBOOK_SIZE
    return lambda waveform: tokenizer.encode([waveform])[0] + offsets


if __name__ == "__main__":
    # 80 s a span: the prompts are shorter, so each is one span, as in the bare loop.
    settings = {"audio": {"checkpoint": "speech", "n_q": CODEBOOKS, "max_frames": 4000}}
    run(Modality.AUDIO, settings, decode, load, lambda waveform: len(waveform) / RATE_HZ, "audio-seconds/s", __doc__)
