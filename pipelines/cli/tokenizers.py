"""Commands around the tokenizers themselves."""

from __future__ import annotations

from typing import Annotated

import typer

from pipelines.cli.options import err

app = typer.Typer(help="Train, fetch, convert and check tokenizers.", no_args_is_help=True)


@app.command(
    "train", add_help_option=False, context_settings={"ignore_unknown_options": True, "allow_extra_args": True}
)
def train(
    context: typer.Context,
    kind: Annotated[
        str, typer.Argument(help="image or audio; `braid tokenizer train image --help` lists the options.")
    ],
) -> None:
    """Train a tokenizer on a folder of pictures or of sounds: `braid tokenizer train image --data DIR --out DIR`."""
    if kind not in ("image", "audio"):
        err.print(f"[bold red]error:[/] kind {kind!r}: what to train is image or audio", highlight=False)
        raise typer.Exit(2)
    import importlib

    importlib.import_module(f"pipelines.tokenizers.train_{kind}").main(context.args)
