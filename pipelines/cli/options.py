"""What the commands share: the two consoles and the arguments that several of them take."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Recipe = Annotated[str, typer.Argument(help="A recipe file, or the name of a shipped recipe.")]
Overrides = Annotated[list[str] | None, typer.Argument(help="Settings that win over the file: a.b=value ...")]
Model = Annotated[
    Path, typer.Argument(help="A run's folder, an exported model's, or the name of a shipped one: spoken_drawings.")
]
DatasetArgument = Annotated[str, typer.Argument(help="Folder or URI of a token dataset.")]
Version = Annotated[int | None, typer.Option(min=0, help="A pinned version; the newest by default.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, and do nothing.")]
On = Annotated[
    str,
    typer.Option(
        "--on", help="local, or slurm: submit a job to the cluster; its settings are given as slurm.KEY=VALUE."
    ),
]
Cluster = Annotated[str, typer.Option("--cluster", help="With --on slurm: a cluster recipe, see docs/slurm.md.")]
After = Annotated[
    list[str] | None,
    typer.Option("--after", help="With --on slurm: start when this job has ended well; may be repeated."),
]
Reasons = Annotated[list[str] | None, typer.Option("--reason", help="Only rejects for this reason; may be repeated.")]
