"""Pictures: the whole job against the bare tokenizer loop: `python -m benchmarks.image_job`.

The shipped tokenizer `drawings` on Tux Paint's stamps; media_job.py says what is compared.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from benchmarks.media_job import run
from pipelines.corpus.pictures import fit_picture, load_picture
from pipelines.sequence import Modality
from pipelines.tokenizers.vqgan import ImageTokenizer


def decode(data: bytes, name: str) -> np.ndarray:
    return fit_picture(load_picture(data, name), 128, multiple=8)


def load() -> Callable[[np.ndarray], np.ndarray]:
    tokenizer = ImageTokenizer.load("drawings")
    return lambda pixels: tokenizer.encode(pixels[None])


if __name__ == "__main__":
    settings = {"image": {"checkpoint": "drawings", "rows": 16, "columns": 16}}
    run(Modality.IMAGE, settings, decode, load, lambda pixels: 1.0, "images/s", __doc__)
