"""The card of an image tokenizer: what it was made from, how, and how well it does on held-out pictures.

Enters: a tokenizer folder, and what its training was told. Leaves: card.json for programs, card.md for people and
samples.png beside the weights. Always holds: the figures are of the weights on disk, not of those in memory.
"""

import json
import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from pipelines.tokenizers.image_data import HELD_OUT_SHARE, PictureSet
from pipelines.tokenizers.image_evaluation import evaluate, write_sheet
from pipelines.tokenizers.vqgan import ImageTokenizer, ImageTokenizerConfig


def write_card(
    folder: Path,
    device: torch.device,
    pictures: PictureSet,
    data: str,
    data_licence: str,
    made: Mapping[str, Any],
) -> None:
    """Evaluate the tokenizer in `folder` on `device` and write its card, in both forms.

    Args:
        data: What the pictures are.
        data_licence: Empty if nobody stated it.
        made: JSON values that tell how it was trained: steps, batch_size, trained_s, seed, init.
    """
    tokenizer = ImageTokenizer.load(folder, device)
    threads = torch.get_num_threads()
    card = {
        "name": folder.name,
        "sha256": tokenizer.sha256,
        "data": data,
        "data_licence": data_licence or "not stated",
        "pictures": len(pictures.whole),
        "held_out": f"{HELD_OUT_SHARE:.0%} of the pictures, by sha256 of the path without suffix",
        "parameters": sum(p.numel() for p in tokenizer.model.parameters()),
        **made,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU, {threads} threads",
        "software": f"torch {torch.__version__}, Python {platform.python_version()}",
        "command": "braid tokenizer train image " + shlex.join(sys.argv[1:]),
        "figures": evaluate(tokenizer, pictures.held_out),
    }
    write_sheet(tokenizer, pictures.held_out, folder / "samples.png")
    (folder / "card.json").write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")
    (folder / "card.md").write_text(card_text(card, tokenizer.config), encoding="utf-8")
    print(json.dumps(card["figures"]), flush=True)


def record_agreement(folder: Path, dtype: str, share: float, *, over: str, hardware: str) -> None:
    """Write into a tokenizer's `card.json` what `ImageTokenizer.agreement` found for a dtype, over what and where."""
    path = folder / "card.json"
    card = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    found = {"equal": round(share, 5), "over": over, "hardware": hardware}
    card["agreement"] = card.get("agreement", {}) | {dtype: found}
    path.write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def card_text(card: Mapping[str, Any], config: ImageTokenizerConfig) -> str:
    """The card for people, from the card for programs."""
    rate = config.downsampling
    lines = [
        f"# {card['name']}",
        "",
        f"An image tokenizer (VQGAN): every {rate} x {rate} pixels become one of {config.codebook_size} codes, so "
        f"{config.resolution} x {config.resolution} pixels become {(config.resolution // rate) ** 2} codes. "
        f"{card['parameters'] / 1e6:.1f} M parameters.",
        "",
        f"Trained on: {card['data']} ({card['pictures']} pictures). Licence of the data: {card['data_licence']}.",
        "",
        "## On held-out pictures",
        "",
        f"Held out: {card['held_out']}. PSNR in dB, L1 on a scale of 255; relative sharpness is 1 where "
        "reconstructions have as much edge as the pictures. Chroma error: the mean error of R - G and B - G on a scale of "
        "255, over pictures with colour; `chroma_error_of_grey` is what their copies without colour have.",
        "",
        "| " + " | ".join(["", *card["figures"]]) + " |",
        "|" + "---|" * (len(card["figures"]) + 1),
        "| this tokenizer | " + " | ".join(str(v) for v in card["figures"].values()) + " |",
    ]
    lines += ["", "## How it was made", ""]
    told = ("steps", "batch_size", "trained_s", "seed", "init", "hardware", "software", "sha256")
    lines += [f"- {name}: {card[name]}" for name in told if card[name] is not None]
    return "\n".join([*lines, "", "```", card["command"], "```", ""])
