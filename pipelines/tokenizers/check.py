"""`braid tokenizer check`: a sheet on which one sees and hears what a tokenizer does to data of one's own.

Enters: a tokenizer of any of the three kinds, and files for it. Leaves: one HTML file with originals beside reconstructions,
figures, and the use of the codes. Always holds: the same tokenizer and files give the same sheet.
"""

from __future__ import annotations

from pathlib import Path

from pipelines.report.frame import write_document
from pipelines.tokenizers import check_audio, check_image, check_text
from pipelines.tokenizers.checkpoint import CONFIG, CheckpointError, read_kind, resolve
from pipelines.tokenizers.sentencepiece import PACKAGED
from pipelines.tokenizers.sheet import CheckError, Request, Watch


def check(
    tokenizer: str,
    data: Path,
    out: Path,
    *,
    limit: int | None = None,
    items: int = 12,
    device: str = "cpu",
    watch: Watch = lambda what, done, total: None,
) -> Path:
    """Write the sheet of a tokenizer.

    Args:
        limit: By default 120 pictures, 60 sounds, or 20,000 lines of text.

    Returns:
        `out`.

    Raises:
        CheckpointError: no such tokenizer.
        CheckError: no data for it.
    """
    kind, name = kind_of(tokenizer)
    make, usual = {
        "image": (check_image.sections, 120),
        "audio": (check_audio.sections, 60),
        "text": (check_text.sections, 20_000),
    }[kind]
    if not data.exists():
        raise CheckError(f"{data}: no such file or folder; name the data with --data.")
    request = Request(
        tokenizer=name, data=data, limit=usual if limit is None else limit, items=items, device=device, watch=watch
    )
    title, subtitle, made = make(request)
    return write_document(out, title, subtitle, made, styles="sheet.css")


def kind_of(tokenizer: str) -> tuple[str, str]:
    """Whether a tokenizer is for text, image or audio, and what loads it.

    Raises:
        CheckpointError: nothing there that is one.
    """
    path = Path(tokenizer).expanduser()
    if tokenizer in PACKAGED or path.suffix == ".model":
        return "text", tokenizer
    if path.is_dir() and not (path / CONFIG).exists():
        models = sorted(path.glob("*.model"))
        if len(models) == 1:
            return "text", str(models[0])
    folder = resolve(tokenizer)
    kind = read_kind(folder)
    if kind not in ("image", "audio"):
        raise CheckpointError(f"{folder} holds a tokenizer of kind {kind!r}; known are image and audio.")
    return kind, tokenizer
