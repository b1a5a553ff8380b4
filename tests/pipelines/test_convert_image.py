"""VQGANs as taming-transformers releases them give the same codes and pictures here."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.convert import convert
from pipelines.tokenizers.vqgan import ImageTokenizer, as_images, as_pixels
from tests.pipelines.released import OriginalVQGAN, write_lightning


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(count: int = 3, side: int = 64) -> np.ndarray:
    rng = np.random.default_rng(2)
    coarse = rng.integers(0, 256, (count, side // 8, side // 8, 3))
    return (np.kron(coarse, np.ones((1, 8, 8, 1))) * 0.8 + rng.integers(0, 50, (count, side, side, 3))).astype(np.uint8)


@pytest.mark.parametrize("levels", [4, 5], ids=["f8", "f16"])
def test_a_vqgan_gives_the_codes_and_pixels_of_the_package(tmp_path: Path, levels: int) -> None:
    original = OriginalVQGAN(levels=levels)
    converted = ImageTokenizer.load(convert(original.release(tmp_path / "vq"), tmp_path / "mine", licence="MIT"))
    assert converted.downsampling == 2 ** (levels - 1)
    batch = pictures()
    codes = converted.encode(batch)
    theirs = torch.cat([original.codes(picture) for picture in as_images(torch.from_numpy(batch)).split(1)])
    np.testing.assert_array_equal(codes, theirs.numpy())
    assert len(np.unique(codes)) > 10
    shown = torch.cat([as_pixels(original.images(part)) for part in theirs.split(1)])
    np.testing.assert_array_equal(converted.decode(codes), shown.numpy())


def test_the_card_says_where_the_weights_come_from_and_what_was_changed(tmp_path: Path) -> None:
    folder = OriginalVQGAN().release(tmp_path / "vq")
    out = convert(folder / "last.ckpt", tmp_path / "mine", licence="MIT", url="https://example.org/last.ckpt")
    card = json.loads((out / "card.json").read_text())
    tokenizer = ImageTokenizer.load(out)
    assert (card["name"], card["kind"], card["sha256"]) == ("mine", "image", tokenizer.sha256)
    assert card["parameters"] == sum(p.numel() for p in tokenizer.model.parameters())
    assert [file["name"] for file in card["source"]["files"]] == ["last.ckpt", "model.yaml"]
    assert card["source"]["files"][0]["sha256"] == hashlib.sha256((folder / "last.ckpt").read_bytes()).hexdigest()
    text = (out / "card.md").read_text()
    for said in ("8 x 8 pixels become one of 64 codes", "Licence of the weights: MIT", "1 tensors of the training loss",
                 "https://example.org/last.ckpt", card["sha256"], card["source"]["files"][0]["sha256"]):  # fmt: skip
        assert said in text
    again = convert(folder, tmp_path / "again")
    assert ImageTokenizer.load(again).sha256 == tokenizer.sha256
    assert json.loads((again / "card.json").read_text())["licence"] == "not stated"


def test_a_gumbel_vqgan_takes_the_code_that_the_package_draws_most_often(tmp_path: Path) -> None:
    original = OriginalVQGAN(gumbel=True)
    original.quantize.proj.weight.mul_(30)
    converted = ImageTokenizer.load(convert(original.release(tmp_path / "vq"), tmp_path / "mine"))
    batch = pictures(2)
    codes = converted.encode(batch)
    logits = [original.quantize(original.latents(one), return_logits=True)[3] for one in _images(batch)]
    np.testing.assert_array_equal(codes, torch.cat(logits).argmax(dim=1).numpy())
    torch.manual_seed(0)
    draws = torch.stack([torch.cat([original.codes(one) for one in _images(batch)]) for _ in range(100)])
    # Noise decides in the original: no single draw is sure, and the best score is ahead of all others.
    assert (draws[0] != draws[1]).any()
    by_code = torch.nn.functional.one_hot(draws, 64).sum(dim=0)
    ahead = by_code.max(dim=-1).values - by_code.topk(2).values[..., 1] > 30
    assert ahead.sum() > 5
    np.testing.assert_array_equal(codes[ahead.numpy()], by_code.argmax(dim=-1)[ahead].numpy())
    shown = torch.cat([as_pixels(original.images(part)) for part in torch.from_numpy(codes).long().split(1)])
    np.testing.assert_array_equal(converted.decode(codes), shown.numpy())
    assert ImageTokenizer.load(tmp_path / "mine").config.quantizer == "gumbel"


@pytest.mark.parametrize("gumbel", [False, True])
def test_a_remap_table_keeps_its_codes_and_their_numbers(tmp_path: Path, gumbel: bool) -> None:
    used = np.random.default_rng(3).permutation(64)[:40]
    np.save(tmp_path / "used.npy", used)
    original = OriginalVQGAN(gumbel=gumbel, remap=tmp_path / "used.npy")
    converted = ImageTokenizer.load(convert(original.release(tmp_path / "vq", remap="used.npy"), tmp_path / "mine"))
    assert converted.codebook_size == 40
    batch = pictures()
    codes = converted.encode(batch)
    if gumbel:
        logits = torch.cat([original.quantize(original.latents(one), return_logits=True)[3] for one in _images(batch)])
        np.testing.assert_array_equal(codes, logits.argmax(dim=1).numpy())
    else:
        # The package gives a square whose best code is not in the table a random one, differently each time.
        draws = torch.stack([torch.cat([original.codes(one) for one in _images(batch)]) for _ in range(8)])
        sure = (draws == draws[0]).all(dim=0).numpy()
        assert 0.2 < sure.mean() < 1
        np.testing.assert_array_equal(codes[sure], draws[0].numpy()[sure])
    shown = torch.cat([as_pixels(original.images(part)) for part in torch.from_numpy(codes).long().split(1)])
    np.testing.assert_array_equal(converted.decode(codes), shown.numpy())


def test_a_remap_table_that_is_a_file_of_its_own_is_found_beside_the_settings(tmp_path: Path) -> None:
    original = OriginalVQGAN()
    folder = original.release(tmp_path / "vq", remap="tables/used.npy")
    with pytest.raises(CheckpointError, match=r"remap names tables/used\.npy, which is not in the checkpoint"):
        convert(folder, tmp_path / "mine")
    (folder / "tables").mkdir()
    np.save(folder / "tables" / "used.npy", np.arange(0, 64, 2))
    assert ImageTokenizer.load(convert(folder, tmp_path / "mine")).codebook_size == 32
    np.save(folder / "tables" / "used.npy", np.array([1, 1, 64]))
    with pytest.raises(CheckpointError, match=r"must name different codes in \[0, 64\)"):
        convert(folder, tmp_path / "other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": True}, r"ddconfig\.double_z is True, but must be False: the latents are means and variances"),
        ({"double_z": None}, r"ddconfig\.double_z is None"),
        ({"in_channels": 1}, r"ddconfig\.in_channels is 1, but must be 3: Braid's pictures are RGB"),
        ({"out_ch": 182}, r"ddconfig\.out_ch is 182"),
        ({"resamp_with_conv": False}, r"ddconfig\.resamp_with_conv is False"),
        ({"ch": 48}, "multiple of 32"),
        ({"ch": 64}, r"another network than the checkpoint's: decoder\.\S+ has shape \[64\], not \[128\]"),
        ({"num_res_blocks": 2}, r"another network than the checkpoint's: .*is missing"),
        ({"ch_mult": [1, 1]}, r"another network than the checkpoint's"),
    ],
)
def test_settings_that_make_no_tokenizer_or_do_not_fit_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    original = OriginalVQGAN()
    folder = original.release(tmp_path / "vq", ddconfig=original.params["ddconfig"] | change)
    with pytest.raises(CheckpointError, match=rf"model\.yaml.*{message}"):
        convert(folder, tmp_path / "mine")
    assert not (tmp_path / "mine").exists()


def test_other_models_are_refused_by_their_target(tmp_path: Path) -> None:
    folder = OriginalVQGAN().release(tmp_path / "vq")
    settings = yaml.safe_load((folder / "model.yaml").read_text())
    settings["model"]["target"] = "taming.models.cond_transformer.Net2NetTransformer"
    (folder / "model.yaml").write_text(yaml.safe_dump(settings))
    with pytest.raises(CheckpointError, match=r"target is 'taming\.models\.cond_transformer\.Net2NetTransformer'"):
        convert(folder, tmp_path / "mine")
    (folder / "model.yaml").write_text("lightning: {trainer: {}}")
    with pytest.raises(CheckpointError, match=r"no `model:` with `target:` and `params:`"):
        convert(folder, tmp_path / "mine")


def test_gumbel_settings_need_equal_widths(tmp_path: Path) -> None:
    folder = OriginalVQGAN(gumbel=True).release(tmp_path / "vq", embed_dim=16)
    with pytest.raises(CheckpointError, match="embed_dim 16 must be z_channels 32 with GumbelVQ"):
        convert(folder, tmp_path / "mine")


def test_what_belongs_to_no_vqgan_is_named(tmp_path: Path) -> None:
    original = OriginalVQGAN()
    folder = original.release(tmp_path / "vq")
    write_lightning(folder / "last.ckpt", {**original.state_dict(), "transformer.tok_emb.weight": torch.zeros(2)})
    with pytest.raises(CheckpointError, match=r"tensors of no VQGAN: transformer\.tok_emb\.weight"):
        convert(folder, tmp_path / "mine")


def test_the_files_are_found_or_asked_for(tmp_path: Path) -> None:
    released = OriginalVQGAN().release(tmp_path / "vq")
    with pytest.raises(CheckpointError, match="no such file or folder"):
        convert(tmp_path / "nowhere", tmp_path / "mine")
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "configs").mkdir()
    checkpoint = (released / "last.ckpt").rename(tmp_path / "run" / "checkpoints" / "last.ckpt")
    settings = (released / "model.yaml").rename(tmp_path / "run" / "configs" / "2021-project.yaml")
    assert ImageTokenizer.load(convert(checkpoint, tmp_path / "found")).codebook_size == 64
    (settings.parent / "2021-lightning.yaml").write_text("{}")
    with pytest.raises(CheckpointError, match=r"which of 2021-lightning\.yaml, 2021-project\.yaml in \S+configs"):
        convert(checkpoint, tmp_path / "mine")
    convert(checkpoint, tmp_path / "mine", config=settings)
    with pytest.raises(CheckpointError, match=r"already holds a config\.json"):
        convert(checkpoint, tmp_path / "mine", config=settings)
    settings.unlink()
    (settings.parent / "2021-lightning.yaml").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.yaml beside it"):
        convert(checkpoint, tmp_path / "other")
    (checkpoint.parent / "first.ckpt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"one file of weights is wanted .*found: first\.ckpt, last\.ckpt"):
        convert(checkpoint.parent, tmp_path / "other")


def _images(batch: np.ndarray) -> tuple[torch.Tensor, ...]:
    return as_images(torch.from_numpy(batch)).split(1)
