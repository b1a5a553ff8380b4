"""Generation: a prompt of text, pictures and sounds, continued with text, pictures and sounds.

    from pipelines.generate import Generator, Request, Sampling, generate

    generate("demo/run", prompt="a red apple", want="image", out="apples", samples=4)

Reading order: `request` (what is asked), `prompt` (what stands before it), `continuation` (what may come next),
`decoding` (the loop), `choosing` and `sampling` (one token), `streaming` (text as it comes),
`generator` (all of it together), `output` (files).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from pipelines.generate.decoding import Watcher
from pipelines.generate.errors import GenerateError
from pipelines.generate.generator import Generator
from pipelines.generate.output import Sample, write
from pipelines.generate.progress import ProgressBar
from pipelines.generate.prompt import Prompt
from pipelines.generate.request import Request
from pipelines.generate.sampling import Sampling
from pipelines.generate.streaming import OnText
from pipelines.tokenize.tokenizers import Tokenizers

__all__ = [
    "GenerateError",
    "Generator",
    "OnText",
    "ProgressBar",
    "Prompt",
    "Request",
    "Sample",
    "Sampling",
    "generate",
    "write",
]


def generate(
    checkpoint: str | Path,
    *,
    prompt: Prompt = "",
    want: str | Sequence[str] = "text",
    out: str | Path | None = None,
    sampling: Sampling | Mapping[str, Sampling] | None = None,
    samples: int = 1,
    seed: int = 0,
    max_tokens: int = 256,
    rows: int | None = None,
    columns: int | None = None,
    seconds: float | None = None,
    batch_size: int = 16,
    device: str | None = None,
    tokenizers: Tokenizers | None = None,
    watcher: Watcher | None = None,
    on_text: OnText | None = None,
) -> list[Sample]:
    """Load a checkpoint, continue one prompt, and write what was made.

    Args:
        checkpoint: a run's folder, or the model's folder in it.
        prompt: a text, the `Path` of a media file, or several of them in order; "" for none.
        want: text, image or audio, or several in order.
        out: folder for the files; without it nothing is written.
        device, tokenizers: see `Generator.load`.
        watcher: is told of progress, such as a `ProgressBar`.
        on_text: is told the text as it comes, see `Generator.generate`.

    The other arguments are those of `Request`.

    Returns:
        The samples; their `files` say where they lie.

    Raises:
        GenerateError: it cannot be made; the message names place, value and remedy.
        CheckpointError: the checkpoint, or a tokenizer that it names, is missing or damaged.
        VocabularyError: a tokenizer is no longer the one that the model was trained with.
    """
    request = Request(
        want=want,
        sampling=Sampling() if sampling is None else sampling,
        samples=samples,
        seed=seed,
        max_tokens=max_tokens,
        rows=rows,
        columns=columns,
        seconds=seconds,
        batch_size=batch_size,
    )
    generator = Generator.load(checkpoint, device=device, tokenizers=tokenizers)
    made = generator.generate([prompt], request, watcher, on_text)
    return made if out is None else write(made, out, generator.settings(request))
