"""A tiny raw corpus and tiny tokenizers with random weights: real parts, seconds of work."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import sentencepiece
import soundfile
import torch
import yaml
from PIL import Image

from pipelines.recipe import read_recipe
from pipelines.tokenize.recipe import TokenizeRecipe
from pipelines.tokenizers.checkpoint import write_checkpoint
from pipelines.tokenizers.encodec import AudioTokenizer, AudioTokenizerConfig, EncodecNetwork
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizerConfig, TowerConfig


def image_tokenizer(folder: Path, *, seed: int = 0) -> Path:
    """f4, 16 x 16 pixels to 4 x 4 codes of 32."""
    torch.manual_seed(seed)
    tower = TowerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
    config = ImageTokenizerConfig(
        encoder=tower, decoder=tower, z_channels=8, embed_dim=4, codebook_size=32, resolution=16
    )
    network = VQGAN(config)
    torch.nn.init.normal_(network.quantize.embedding.weight)
    return write_checkpoint(folder, config.to_json(), network.state_dict())


def audio_tokenizer(folder: Path, *, seed: int = 0) -> Path:
    """8 kHz, 100 frames a second, 3 codebooks of 16."""
    torch.manual_seed(seed)
    config = AudioTokenizerConfig(
        sample_rate_hz=8000, n_q=3, codebook_size=16, n_filters=4, ratios=(5, 4, 4), dimension=8, lstm=1
    )
    network = EncodecNetwork(config)
    network.initialise()
    for codebook in network.codebooks:
        torch.nn.init.normal_(codebook.embed)  # type: ignore[arg-type]
        codebook.inited.fill_(1.0)  # type: ignore[operator, union-attr]
    return AudioTokenizer(network, name="tiny", sha256="").save(folder)


def text_tokenizer(file: Path) -> Path:
    """150 pieces, bytes for what is unknown."""
    lines = [f"the quick brown fox {n} jumps over lazy dogs and cats number {n * 7}" for n in range(200)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(file.with_suffix("")),
        vocab_size=350,
        byte_fallback=True,
        minloglevel=2,
    )
    return file


def write_stamp(folder: Path, stem: str, rng: np.random.Generator) -> None:
    """A picture, its caption and a sound with the same stem."""
    folder.mkdir(parents=True, exist_ok=True)
    pixels = rng.integers(0, 256, (rng.integers(8, 40), rng.integers(8, 40), 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / f"{stem}.png")
    (folder / f"{stem}.txt").write_text(f"the fox {stem}")
    seconds = rng.uniform(0.1, 0.6)
    tone = np.sin(np.arange(int(8000 * seconds)) * rng.uniform(0.05, 0.5)) * 0.4
    soundfile.write(folder / f"{stem}.wav", tone.astype(np.float32), 8000)


def write_corpus(folder: Path, *, stamps: int = 12, lines: int = 30, seed: int = 0) -> None:
    """`stamps/` and `lines.jsonl`."""
    rng = np.random.default_rng(seed)
    for index in range(stamps):
        write_stamp(folder / "stamps", f"s{index:03}", rng)
    texts = [{"text": f"the lazy dog {n} " * int(rng.integers(1, 9))} for n in range(lines)]
    (folder / "lines.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))


def write_recipe(folder: Path) -> Path:
    """Tokenizers, and a recipe over the corpus of `write_corpus` below the same folder."""
    recipe = {
        "dataset": str(folder / "tokens"),
        "sources": [
            {"name": "stamps", "reader": "media_folder", "path": str(folder / "stamps")},
            {"name": "lines", "reader": "jsonl", "path": str(folder / "lines.jsonl")},
        ],
        "tokenizers": {
            "text": {"model": str(text_tokenizer(folder / "text.model"))},
            "image": {"checkpoint": str(image_tokenizer(folder / "image")), "rows": 4, "columns": 4},
            "audio": {"checkpoint": str(audio_tokenizer(folder / "audio")), "n_q": 2, "max_frames": 40},
        },
        "sequence_length": 256,
        "validation_share": 0.2,
        "error_budget": 0.2,
        "units": {"inputs": 3, "bytes": 500},
        "workers": 2,
    }
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(recipe))
    return file


def tiny_recipe(folder: Path, *overrides: str) -> TokenizeRecipe:
    """Corpus, tokenizers and recipe in one."""
    write_corpus(folder)
    return read_recipe(TokenizeRecipe, write_recipe(folder), overrides)
