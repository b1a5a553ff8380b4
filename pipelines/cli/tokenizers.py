"""Commands around the tokenizers themselves."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from pipelines.cli.options import err, out

app = typer.Typer(help="Train, fetch, convert and check tokenizers.", no_args_is_help=True)
train_app = typer.Typer(help="Train a tokenizer on your own data.", no_args_is_help=True)
app.add_typer(train_app, name="train")

# Their own parsers know the options, `--help` among them; every option is a field of their settings.
_PASS_ON = {"ignore_unknown_options": True, "allow_extra_args": True}

Folder = Annotated[Path, typer.Option("--out", help="The tokenizer's folder; its last part is its name.")]
Licence = Annotated[str, typer.Option(help="Licence of the weights, for the card.")]


@train_app.command("image", add_help_option=False, context_settings=_PASS_ON)
def train_image(context: typer.Context) -> None:
    """A VQGAN on a folder of pictures: `braid tokenizer train image --data DIR --out DIR`; --help lists the options."""
    _pass_on("image", context)


@train_app.command("audio", add_help_option=False, context_settings=_PASS_ON)
def train_audio(context: typer.Context) -> None:
    """An EnCodec on a folder of sounds: `braid tokenizer train audio --data DIR --out DIR`; --help lists the options."""
    _pass_on("audio", context)


def _pass_on(kind: str, context: typer.Context) -> None:
    importlib.import_module(f"pipelines.tokenizers.train_{kind}").main(context.args)


@train_app.command("text")
def train_text(
    data: Annotated[list[Path], typer.Option(help="A .txt or .jsonl file, or a folder of them; may be repeated.")],
    folder: Folder,
    pieces: Annotated[int, typer.Option(min=2, help="Size of the vocabulary.")] = 32_000,
    max_mb: Annotated[
        float, typer.Option(min=0.001, help="Text to train on at most; of more, lines are drawn.")
    ] = 200.0,
    seed: Annotated[int, typer.Option(help="For the draw.")] = 0,
    text_field: Annotated[str, typer.Option(help="Of a .jsonl file, the field with the text.")] = "text",
    data_name: Annotated[str, typer.Option(help="What the data are, for the card.")] = "",
    data_licence: Annotated[str, typer.Option(help="Their licence, for the card.")] = "",
) -> None:
    """A SentencePiece model (BPE with byte fallback) on texts; DIR/NAME.model is what a recipe names."""
    import shlex
    import sys

    from pipelines.tokenizers.train_text import TextTrainingOptions, train

    options = TextTrainingOptions(
        data=tuple(data),
        out=folder,
        pieces=pieces,
        max_mb=max_mb,
        seed=seed,
        text_field=text_field,
        data_name=data_name,
        data_licence=data_licence,
        command=f"braid {shlex.join(sys.argv[1:])}",
    )
    out.print(f"The model is {train(options)}", markup=False, highlight=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="A released checkpoint, or the folder that holds it.")],
    folder: Folder,
    config: Annotated[
        Path | None, typer.Option(help="The model.yaml or config.json; found beside the weights by default.")
    ] = None,
    licence: Licence = "",
) -> None:
    """Turn a released checkpoint into a tokenizer of Braid.

    Supports VQGANs of taming-transformers (model.yaml and last.ckpt, also Gumbel), EnCodec's .th files, and Hugging Face's
    EncodecModel. Pickles are read without executing any code in them.
    """
    from pipelines.tokenizers.convert import convert as run

    _say_converted(run(source, folder, config=config, licence=licence))


@app.command()
def fetch(
    source: Annotated[str, typer.Argument(help="An address (http, https, file), or encodec_24khz or encodec_48khz.")],
    folder: Annotated[Path, typer.Option("--out", help="Where the file goes.")],
    sha256: Annotated[str, typer.Option(help="What the file must have; a known name has its own.")] = "",
    name: Annotated[str, typer.Option(help="Of the file; by default the end of the address.")] = "",
    convert: Annotated[bool, typer.Option("--convert", help="Make the folder a tokenizer at once.")] = False,
    licence: Licence = "",
    attempts: Annotated[int, typer.Option(min=1, help="Before giving up on a connection that breaks.")] = 6,
    timeout_s: Annotated[float, typer.Option(min=0.1, help="Silence after which an attempt ends.")] = 30.0,
) -> None:
    """Fetch a released file and check its sha256; the same command goes on where a broken one stopped."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from pipelines.tokenizers.fetch import KNOWN
    from pipelines.tokenizers.fetch import fetch as run

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=err, transient=True) as bar:
        task = bar.add_task(name or source.rpartition("/")[2], total=None)
        path = run(
            source,
            folder,
            sha256=sha256,
            name=name,
            attempts=attempts,
            timeout_s=timeout_s,
            watch=lambda done, total: bar.update(task, completed=done, total=total),
        )
    out.print(f"Fetched {path}", markup=False, highlight=False, soft_wrap=True)
    if convert:
        from pipelines.tokenizers.convert import convert as make

        _say_converted(make(path, folder, licence=licence, url=KNOWN[source].url if source in KNOWN else source))


@app.command()
def check(
    tokenizer: Annotated[str, typer.Argument(help="A name, a tokenizer's folder, or a SentencePiece model's file.")],
    data: Annotated[Path, typer.Option(help="Pictures, sounds or texts to try it on: a file, or a folder of them.")],
    sheet: Annotated[Path, typer.Option("--out", help="The page to write.")] = Path("sheet.html"),
    limit: Annotated[
        int | None,
        typer.Option(min=1, help="Items to measure, of all: 120 pictures, 60 sounds, 20,000 lines by default."),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Of those, shown.")] = 12,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
) -> None:
    """Write one HTML page: originals beside what a tokenizer makes of them, figures, and the use of its codes."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from pipelines.tokenizers.check import check as write

    with Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err, transient=True
    ) as bar:
        task = bar.add_task("loading", total=None)
        written = write(
            tokenizer,
            data,
            sheet,
            limit=limit,
            items=items,
            device=device,
            watch=lambda what, done, total: bar.update(task, description=what, completed=done, total=total),
        )
    out.print(f"Open {written}", markup=False, highlight=False, soft_wrap=True)


def _say_converted(folder: Path) -> None:
    out.print(
        f"The tokenizer is in {folder}; its card is {folder / 'card.md'}", markup=False, highlight=False, soft_wrap=True
    )
