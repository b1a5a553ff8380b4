"""`braid tokenizer convert`: a released checkpoint becomes a folder that Braid loads.

Enters: a file of weights or a folder that holds one, in a layout known by the names of its tensors: of EnCodec's package, of
Hugging Face's `EncodecModel`, of taming-transformers. Leaves: `config.json`, `weights.safetensors`, `card.json` and
`card.md`. Always holds: nothing is written before everything fits, and no code of the file is run (`pickles`).
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor

from pipelines.tokenizers.checkpoint import CONFIG, CheckpointError, checkpoint_sha256, write_checkpoint
from pipelines.tokenizers.convert_encodec import ConvertedAudio, from_encodec, from_hugging_face
from pipelines.tokenizers.convert_taming import ConvertedImage, from_taming
from pipelines.tokenizers.encodec_network import EncodecNetwork
from pipelines.tokenizers.pickles import read_state_dict

WEIGHTS_SUFFIXES = (".safetensors", ".ckpt", ".th", ".pt", ".pth", ".bin")


def convert(source: Path, out: Path, *, config: Path | None = None, licence: str = "", url: str = "") -> Path:
    """Convert a checkpoint.

    Args:
        source: The weights, or a folder with one file of weights.
        out: The tokenizer's folder; its last part is its name.
        config: `model.yaml` or `config.json`, where the layout needs one; found beside the weights by default.
        licence: Of the weights, for the card.
        url: Where the weights came from, for the card.

    Returns:
        `out`.

    Raises:
        CheckpointError: no such file, an unknown layout, a model that Braid cannot run, or a tokenizer in `out` already.
    """
    if (out / CONFIG).exists():
        raise CheckpointError(f"{out} already holds a {CONFIG}: name another folder with --out, or remove it.")
    file = _weights_file(source)
    state = read_state_dict(file)
    used: Path | None = None
    converted: ConvertedAudio | ConvertedImage
    if "encoder.layers.0.conv.bias" in state:
        used = config or _beside(file, CONFIG)
        converted, layout = from_hugging_face(_json(used), state, str(used)), "Hugging Face EncodecModel"
    elif "encoder.model.0.conv.conv.bias" in state:
        if (file.parent / CONFIG).exists() and "kind" in _json(file.parent / CONFIG):
            raise CheckpointError(f"{file.parent} is a tokenizer of Braid already: use it as it is.")
        converted, layout = from_encodec(state, str(file)), "encodec state dict"
    elif "encoder.conv_in.weight" in state:
        used = config or _beside(file, "model.yaml")
        converted, layout = from_taming(_yaml(used), state, str(used), used.parent), "taming-transformers checkpoint"
    else:
        raise CheckpointError(
            f"{file}: neither EnCodec nor a VQGAN of taming-transformers: its tensors are named {sorted(state)[:3]}, ..."
        )
    values = _write(converted, out, str(file))
    facts = {
        "name": out.resolve().name,
        "kind": values["kind"],
        "sha256": checkpoint_sha256(out),
        "source": {"layout": layout, "url": url or None, "files": [_described(f) for f in (file, used) if f]},
        "licence": licence or "not stated",
        "parameters": sum(math.prod(tensor.shape) for tensor in converted.weights.values()),
        "architecture": {name: value for name, value in values.items() if name != "kind"},
        "changes": list(converted.changes),
    }
    (out / "card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "card.md").write_text(card_text(facts), encoding="utf-8")
    return out


def _write(converted: ConvertedAudio | ConvertedImage, out: Path, where: str) -> dict[str, Any]:
    """Write weights that are known to fit; the content of config.json."""
    weights: Mapping[str, Tensor] = converted.weights
    if isinstance(converted, ConvertedAudio):
        network = EncodecNetwork(converted.config)
        network.load_weights(weights, where)
        values = {"kind": "audio", **asdict(converted.config), "ratios": list(converted.config.ratios)}
        weights = network.weights()
    else:
        values = converted.config.to_json()
    write_checkpoint(out, values, weights)
    return values


def card_text(facts: Mapping[str, Any]) -> str:
    """The card for people, from the card for programs."""
    source, shape = facts["source"], facts["architecture"]
    lines = [f"# {facts['name']}", "", _summary(facts["kind"], shape, facts["parameters"]), ""]
    lines += [
        f"sha256 of config and weights: `{facts['sha256']}`",
        "",
        f"Licence of the weights: {facts['licence']}.",
        "",
    ]
    lines += ["## Where it comes from", "", f"Converted from: {source['layout']}."]
    if source["url"]:
        lines += ["", f"<{source['url']}>"]
    lines += ["", "| file | bytes | sha256 |", "|---|---|---|"]
    lines += [f"| {file['name']} | {file['bytes']:,} | `{file['sha256']}` |" for file in source["files"]]
    lines += ["", "## What is not as in the source", ""]
    lines += [f"- {change}" for change in facts["changes"]] or ["Nothing."]
    lines += ["", "## Architecture", "", "| | |", "|---|---|"]
    lines += [f"| {name} | {json.dumps(value)} |" for name, value in shape.items()]
    return "\n".join([*lines, "", "See and hear what it does: `braid tokenizer check`.", ""])


def _summary(kind: str, shape: Mapping[str, Any], parameters: int) -> str:
    size = f"{parameters:,} parameters"
    if kind == "image":
        side = 2 ** (len(shape["encoder"]["ch_mult"]) - 1)
        codes = f"one of {shape['codebook_size']} codes"
        return f"An image tokenizer (VQGAN): every {side} x {side} pixels become {codes}. {size}."
    rate = shape["sample_rate_hz"] / math.prod(shape["ratios"])
    first = ", the first of them the loudness" if shape["normalize"] else ""
    return (
        f"An audio tokenizer (EnCodec): {shape['sample_rate_hz']} Hz, {rate:g} frames a second, {shape['n_q']} codebooks of "
        f"{shape['codebook_size']}{first}. {size}."
    )


def _weights_file(source: Path) -> Path:
    if source.is_file():
        return source
    if not source.is_dir():
        raise CheckpointError(
            f"{source}: no such file or folder; name the checkpoint, or fetch it with `braid tokenizer fetch`."
        )
    found = sorted(path for path in source.iterdir() if path.suffix in WEIGHTS_SUFFIXES)
    # Hugging Face ships the same weights twice, and the pickle is the older way.
    if len(found) > 1 and (source / "model.safetensors") in found:
        return source / "model.safetensors"
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{source}: one file of weights is wanted ({', '.join(WEIGHTS_SUFFIXES)}), found: {names}."
        )
    return found[0]


def _beside(file: Path, name: str) -> Path:
    """The file of settings that belongs to weights: that name, or else the only file of that suffix."""
    for folder in (file.parent, file.parent.parent / "configs"):
        found = sorted(folder.glob(f"*{Path(name).suffix}"))
        if folder / name in found:
            return folder / name
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(f"{file}: which of {names} in {folder} describes it? Say so with --config.")
        if found:
            return found[0]
    raise CheckpointError(f"{file}: no {name} beside it, which describes the network; name it with --config.")


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as fault:
        raise CheckpointError(f"cannot read {path}: {fault}") from fault
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: an object is wanted, found {type(values).__name__}.")
    return values


def _yaml(path: Path) -> Any:
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as fault:
        raise CheckpointError(f"cannot read {path}: {fault}") from fault


def _described(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        return {
            "name": path.name,
            "bytes": path.stat().st_size,
            "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
        }
