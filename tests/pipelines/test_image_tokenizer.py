"""The image tokenizer: its checkpoint, its codes, its training."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from pipelines.corpus.errors import MediaError
from pipelines.corpus.pictures import Pixels
from pipelines.sequence import VocabularyError
from pipelines.tokenizers.checkpoint import CheckpointError, checkpoint_sha256, write_checkpoint
from pipelines.tokenizers.image_card import record_agreement
from pipelines.tokenizers.image_data import is_held_out, read_pictures
from pipelines.tokenizers.image_losses import chroma_error, reconstruction_loss, without_chroma
from pipelines.tokenizers.image_start import start_as_pyramid
from pipelines.tokenizers.train_image import ImageTrainingOptions, train
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizer, ImageTokenizerConfig, TowerConfig

TOWER = TowerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
TINY = ImageTokenizerConfig(encoder=TOWER, decoder=TOWER, z_channels=8, embed_dim=4, codebook_size=24, resolution=32)
"""One code for 4 x 4 pixels."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def _random_model(seed: int = 0) -> VQGAN:
    torch.manual_seed(seed)
    model = VQGAN(TINY)
    # Entries at the size of the latents, or one of them would take every square.
    torch.nn.init.normal_(model.quantize.embedding.weight, std=0.5)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    where = tmp_path_factory.mktemp("tokenizers") / "tiny"
    return write_checkpoint(where, TINY.to_json(), _random_model().state_dict())


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> ImageTokenizer:
    return ImageTokenizer.load(folder)


def _pictures(count: int, rows: int = 32, columns: int = 32, seed: int = 1) -> Pixels:
    return np.random.default_rng(seed).integers(0, 256, (count, rows, columns, 3), dtype=np.uint8)


def test_a_checkpoint_gives_back_the_same_codes_pixels_and_sha256(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    state = tokenizer.model.state_dict()
    again = ImageTokenizer.load(write_checkpoint(tmp_path / "copy", tokenizer.config.to_json(), state))
    pictures = _pictures(3)
    codes = tokenizer.encode(pictures)
    assert len(np.unique(codes)) > 4
    np.testing.assert_array_equal(again.encode(pictures), codes)
    np.testing.assert_array_equal(again.decode(codes), tokenizer.decode(codes))
    assert again.sha256 == tokenizer.sha256 == checkpoint_sha256(tmp_path / "copy")
    assert (again.config, again.name) == (TINY, "copy")


def test_another_weight_or_another_config_is_another_tokenizer(tmp_path: Path, tokenizer: ImageTokenizer) -> None:
    state = {name: tensor.clone() for name, tensor in tokenizer.model.state_dict().items()}
    state["decoder.conv_out.bias"][0] += 1e-3
    config = dataclasses.replace(TINY, resolution=64).to_json()
    found = {
        tokenizer.sha256,
        checkpoint_sha256(write_checkpoint(tmp_path / "weight", TINY.to_json(), state)),
        checkpoint_sha256(write_checkpoint(tmp_path / "config", config, tokenizer.model.state_dict())),
    }
    assert len(found) == 3


def test_the_card_is_no_part_of_the_identity(tmp_path: Path) -> None:
    where = write_checkpoint(tmp_path / "tiny", TINY.to_json(), _random_model().state_dict())
    before = checkpoint_sha256(where)
    (where / "card.json").write_text("{}", encoding="utf-8")
    assert checkpoint_sha256(where) == before


def test_encode_and_decode_have_the_shapes_they_state(tokenizer: ImageTokenizer) -> None:
    codes = tokenizer.encode(_pictures(2, 40, 24))
    assert (codes.shape, codes.dtype) == ((2, 10, 6), np.int32)
    assert codes.min() >= 0
    assert codes.max() < tokenizer.codebook_size == 24
    pixels = tokenizer.decode(codes)
    assert (pixels.shape, pixels.dtype) == ((2, 40, 24, 3), np.uint8)
    np.testing.assert_array_equal(tokenizer.decode(codes.astype(np.int64)), pixels)


def test_an_empty_batch_is_an_empty_batch(tokenizer: ImageTokenizer) -> None:
    assert tokenizer.encode(_pictures(0)).shape == (0, 8, 8)
    assert tokenizer.decode(np.empty((0, 8, 8), np.int32)).shape == (0, 32, 32, 3)


def test_codes_and_pixels_do_not_depend_on_the_rest_of_the_batch(tokenizer: ImageTokenizer) -> None:
    pictures = _pictures(5)
    together = tokenizer.encode(pictures)
    shown = tokenizer.decode(together)
    for index in range(5):
        np.testing.assert_array_equal(tokenizer.encode(pictures[index : index + 1])[0], together[index])
        np.testing.assert_array_equal(tokenizer.decode(together[index : index + 1])[0], shown[index])


def test_encoding_twice_gives_the_same_codes_whatever_the_strides(tokenizer: ImageTokenizer) -> None:
    pictures = _pictures(2)
    strided = np.asfortranarray(pictures)
    np.testing.assert_array_equal(tokenizer.encode(pictures), tokenizer.encode(strided))
    mirrored = tokenizer.encode(pictures[:, :, ::-1])
    np.testing.assert_array_equal(mirrored, tokenizer.encode(pictures[:, :, ::-1].copy()))


@pytest.mark.parametrize("value", [-1, 24, 2**31 - 1])
def test_a_code_outside_the_codebook_is_refused_with_its_place_and_value(tokenizer: ImageTokenizer, value: int) -> None:
    codes = tokenizer.encode(_pictures(3))
    codes[2, 5, 7] = value
    with pytest.raises(VocabularyError, match=rf"code {value} of picture 2 at row 5, column 7 .*\[0, 24\); 1 such"):
        tokenizer.decode(codes)


def test_pixels_and_codes_of_another_shape_or_dtype_are_refused(tokenizer: ImageTokenizer) -> None:
    with pytest.raises(ValueError, match=r"takes uint8 \[B, H, W, 3\], found float32 \[1, 32, 32, 3\]"):
        tokenizer.encode(_pictures(1).astype(np.float32))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found uint8 \[32, 32, 3\]"):
        tokenizer.encode(_pictures(1)[0])
    with pytest.raises(ValueError, match=r"32 x 30 pixels: .* multiples of 4 in both directions; use fit_picture"):
        tokenizer.encode(_pictures(1, 32, 30))
    with pytest.raises(ValueError, match=r"takes integers \[B, rows, columns\], found float64 \[1, 8, 8\]"):
        tokenizer.decode(np.ones((1, 8, 8)))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"found int32 \[8, 8\]"):
        tokenizer.decode(np.ones((8, 8), np.int32))


def test_another_dtype_agrees_in_most_codes_and_the_share_is_measured(folder: Path, tokenizer: ImageTokenizer) -> None:
    pictures = _pictures(8)
    coarse = ImageTokenizer.load(folder, dtype=torch.bfloat16)
    share = coarse.agreement(tokenizer, pictures)
    assert 0.8 < share < 1
    assert share == (coarse.encode(pictures) == tokenizer.encode(pictures)).mean()
    assert tokenizer.agreement(tokenizer, pictures) == 1


def test_agreement_is_recorded_in_the_card_beside_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "card.json").write_text('{"name": "tiny", "agreement": {"float16": {"equal": 0.5}}}')
    record_agreement(tmp_path, "bfloat16", 0.9712345, over="8 pictures", hardware="a GPU")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["name"] == "tiny"
    assert card["agreement"] == {
        "float16": {"equal": 0.5},
        "bfloat16": {"equal": 0.97123, "over": "8 pictures", "hardware": "a GPU"},
    }


def test_a_dtype_or_batch_size_that_makes_no_tokenizer_is_refused(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"float32, float16 or bfloat16 .* found torch\.float64 and 64"):
        ImageTokenizer.load(folder, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"positive batch size, found torch\.float32 and 0"):
        ImageTokenizer.load(folder, batch_size=0)


def test_a_picture_whose_activations_overflow_is_refused_by_number(tmp_path: Path) -> None:
    model = _random_model()
    with torch.no_grad():
        model.encoder.conv_in.weight.fill_(1e4)
    where = write_checkpoint(tmp_path / "loud", TINY.to_json(), model.state_dict())
    pictures = np.full((2, 32, 32, 3), 128, np.uint8)
    pictures[1] = 255
    with pytest.raises(FloatingPointError, match=r"picture 1 of 2: 'loud' computes numbers that torch\.float16 cannot"):
        ImageTokenizer.load(where, dtype=torch.float16).encode(pictures)
    ImageTokenizer.load(where).encode(pictures)


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(CheckpointError, match="no tokenizer 'drawngs': neither a shipped name"):
        ImageTokenizer.load("drawngs")


@pytest.mark.parametrize("file", ["config.json", "weights.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, file: str) -> None:
    where = write_checkpoint(tmp_path / "tiny", TINY.to_json(), _random_model().state_dict())
    (where / file).unlink()
    with pytest.raises(CheckpointError, match=rf"tiny is no tokenizer: it lacks {file}"):
        ImageTokenizer.load(where)


def test_a_tokenizer_of_another_kind_is_refused(tmp_path: Path) -> None:
    state = {"w": torch.randn(3)}
    where = write_checkpoint(tmp_path / "voice", {"kind": "audio"}, state)
    with pytest.raises(CheckpointError, match=r"^\S*voice holds a tokenizer of kind 'audio', but one of kind 'image'"):
        ImageTokenizer.load(where)
    with pytest.raises(CheckpointError, match="found 'video'"):
        write_checkpoint(tmp_path / "film", {"kind": "video"}, state)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"codebook_sise": 3}, "codebook_sise"),
        ({"encoder": 3}, "encoder must be an object"),
        ({"encoder": {"ch": 33, "ch_mult": [1, 1, 1], "num_res_blocks": 1}}, "multiple of 32"),
        ({"resolution": 30}, "no multiple of the downsampling 4"),
        ({"codebook_size": 25}, "do not fit its config.json"),
    ],
)
def test_a_config_that_fits_no_network_is_refused(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    where = write_checkpoint(tmp_path / "odd", TINY.to_json() | change, _random_model().state_dict())
    with pytest.raises(CheckpointError, match=rf"odd.*{reason}"):
        ImageTokenizer.load(where)


def test_damaged_files_are_named(tmp_path: Path) -> None:
    where = write_checkpoint(tmp_path / "tiny", TINY.to_json(), _random_model().state_dict())
    weights = where / "weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"cannot read \S*tiny/weights.safetensors"):
        ImageTokenizer.load(where)
    (where / "config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=r"cannot read \S*tiny/config.json"):
        ImageTokenizer.load(where)


def test_weights_that_the_dtype_cannot_hold_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"weight w is not finite as torch\.float16"):
        write_checkpoint(tmp_path / "big", TINY.to_json(), {"w": torch.tensor([1e6])}, torch.float16)
    assert not (tmp_path / "big").exists()


def _draw(folder: Path, count: int) -> None:
    """Drawings of a few shapes; the last two have names that are held out."""
    random = np.random.default_rng(5)
    held_out = [name for name in map(str, range(400)) if is_held_out(Path(name))][:2]
    training = [name for name in (f"drawing{i}" for i in range(400)) if not is_held_out(Path(name))][:count]
    for name in [*training, *held_out]:
        image = Image.new("RGB", (48, 40), "white")
        draw = ImageDraw.Draw(image)
        for _ in range(3):
            x, y = random.integers(0, 30, 2).tolist()
            shape = draw.ellipse if random.random() < 0.5 else draw.rectangle
            shape((x, y, x + 14, y + 10), fill=tuple(random.integers(0, 256, 3).tolist()), outline="black")
        image.save(folder / f"{name}.png")


def test_training_lowers_the_loss_and_leaves_a_tokenizer_with_its_card(tmp_path: Path) -> None:
    data, out = tmp_path / "drawings", tmp_path / "out" / "mine"
    data.mkdir()
    _draw(data, 24)
    (data / "broken.png").write_bytes(b"no picture")
    options = ImageTrainingOptions(
        data=data, out=out, minutes=2, steps=30, batch_size=8, lr=2e-3, config=TINY, device="cpu",
        compile=False, log_every=4, data_licence="made by this test",
    )  # fmt: skip
    assert train(options) == out

    losses = [json.loads(line)["loss"] for line in (out / "losses.jsonl").read_text().splitlines()]
    assert len(losses) == 7
    assert losses[-2] < 0.8 * losses[0]
    tokenizer = ImageTokenizer.load(out)
    codes = tokenizer.encode(_pictures(2))
    assert tokenizer.decode(codes).shape == (2, 32, 32, 3)

    card = json.loads((out / "card.json").read_text())
    assert (card["name"], card["sha256"], card["steps"]) == ("mine", tokenizer.sha256, 30)
    assert (card["data"], card["pictures"], card["batch_size"], card["init"]) == ("drawings", 24, 8, None)
    assert card["data_licence"] == "made by this test"
    assert card["figures"]["pictures"] == 2
    assert card["figures"]["codes_used"] > 1
    assert card["figures"]["coloured_pictures"] == 2
    assert 0 < card["figures"]["chroma_error"] < 2 * card["figures"]["chroma_error_of_grey"]
    text = (out / "card.md").read_text()
    assert "# mine" in text
    assert tokenizer.sha256 in text
    assert str(card["figures"]["psnr_db"]) in text
    assert Image.open(out / "samples.png").size[0] == 12 * 32


def _flat_colours(seed: int) -> torch.Tensor:
    """Images [16, 3, 32, 32]: on white, a square of one colour each."""
    images = torch.ones(16, 3, 32, 32)
    images[:, :, 8:24, 8:24] = torch.rand(16, 3, 1, 1, generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return images


def test_an_untrained_network_already_tells_hues_apart() -> None:
    torch.manual_seed(0)
    model = VQGAN(dataclasses.replace(TINY, norm_groups=4))
    start_as_pyramid(model)
    images = _flat_colours(0)
    with torch.no_grad():
        latents, grey = model.latents(images), model.latents(without_chroma(images))
        seen = model.images(latents) - model.images(grey)
    inside = (slice(None), slice(None), slice(3, 5), slice(3, 5))
    assert (latents - grey)[inside].std() > 0.2 * latents.std()
    assert seen[:, :, 14:18, 14:18].std() > 0.1


def test_the_loss_and_the_chroma_error_see_a_wrong_hue_of_the_right_brightness() -> None:
    images = _flat_colours(1)
    turned = images.roll(1, dims=1)
    torch.testing.assert_close(without_chroma(turned), without_chroma(images))
    brightened = images + 0.1
    assert (chroma_error(images, turned) > 5 * chroma_error(images, brightened)).all()
    assert reconstruction_loss(images, turned) > reconstruction_loss(images, without_chroma(images))


def test_pictures_held_out_are_never_trained_on_even_as_copies(tmp_path: Path) -> None:
    _draw(tmp_path, 8)
    held_out = next(path for path in tmp_path.iterdir() if is_held_out(path.relative_to(tmp_path)))
    (tmp_path / "copies").mkdir()
    # A name that the hash would give to training.
    name = next(f"{i}.png" for i in range(99) if not is_held_out(Path("copies") / f"{i}.png"))
    (tmp_path / "copies" / name).write_bytes(held_out.read_bytes())
    (tmp_path / "broken.png").write_bytes(b"no picture")
    pictures = read_pictures(tmp_path, 32, workers=2)
    known = {picture.tobytes() for picture in pictures.held_out}
    assert not known & {picture.tobytes() for picture in pictures.whole}
    assert pictures.whole.shape[1:] == (32, 32, 3)
    assert pictures.large.shape == (len(pictures.whole), 40, 40, 3)
    assert [why.split(":")[0] for why in pictures.refused] == ["broken.png"]


def test_too_few_pictures_are_refused_with_their_number(tmp_path: Path) -> None:
    Image.fromarray(_pictures(1)[0]).save(tmp_path / "one.png")
    with pytest.raises(MediaError, match="1 picture files, of which 1 to train on and 0 held out"):
        read_pictures(tmp_path, 32, workers=1)
