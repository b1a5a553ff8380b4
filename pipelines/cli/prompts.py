"""Options of `braid generate` whose order or whose parts matter.

Enters: a command line. Leaves: the prompt's parts in the order in which they were given, and numbers by modality.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import typer
from typer.core import TyperCommand

_PARTS = ("prompt", "image", "audio")
_LABELS = ("text", "image", "audio")
_GIVEN = "pipelines.cli.prompts.given"


class InOrder(TyperCommand):
    """A command that remembers its arguments as they were given: the parser sorts them by option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.meta[_GIVEN] = list(args)
        return list(super().parse_args(ctx, args))


def prompt_items(context: typer.Context) -> list[tuple[str, str]]:
    """(option, value) of `--prompt`, `--image` and `--audio`, in their order."""
    return in_order(context.meta[_GIVEN])


def in_order(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """The same, of a command line that the parser has accepted."""
    found = []
    rest = iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if name.removeprefix("--") in _PARTS and name.startswith("--"):
            found.append((name[2:], value if equals else next(rest, "")))
    return found


def by_modality(values: Sequence[str], option: str) -> dict[str, float]:
    """`1.2` for all modalities, `text=1.2` for one; later ones win."""
    result: dict[str, float] = {}
    for value in values:
        name, equals, number = value.rpartition("=")
        try:
            told = float(number)
        except ValueError:
            message = f"{value}: give a number, or one of a modality: text=1.2"
            raise typer.BadParameter(message, param_hint=option) from None
        if equals and name not in _LABELS:
            raise typer.BadParameter(f"{value}: {name} is no modality: {', '.join(_LABELS)}", param_hint=option)
        result |= {name: told} if equals else dict.fromkeys(_LABELS, told)
    return result
