"""The image tokenizer on a GPU: the codes of each dtype, batches, and what must not depend on them."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.natural_pictures import natural_pictures
from pipelines.corpus.pictures import Pixels
from pipelines.tokenizers.checkpoint import write_checkpoint
from pipelines.tokenizers.gpu_batches import FixedBatches
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizer, ImageTokenizerConfig, TowerConfig, as_images

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

TOWER = TowerConfig(ch=32, ch_mult=(1, 1, 2), num_res_blocks=1, attn_resolutions=(32,))
CONFIG = ImageTokenizerConfig(
    encoder=TOWER, decoder=TOWER, z_channels=32, embed_dim=16, codebook_size=256, resolution=128
)
"""Wide levels, which our kernel convolves, narrow ones, which cuDNN does, and attention."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    # Small networks gain nothing from threads, which wait for each other where several processes test at once.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=["nearest", "gumbel"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = dataclasses.replace(CONFIG, quantizer=request.param)
    model = VQGAN(config).eval()
    with torch.no_grad():
        for layer in model.encoder.modules():
            if isinstance(layer, torch.nn.GroupNorm):
                layer.weight.normal_(1, 0.3)
                layer.bias.normal_(0, 0.3)
        if request.param == "nearest":
            vectors = model.latents(as_images(_natural(4))).permute(0, 2, 3, 1).flatten(0, 2)
            model.quantize.embedding.weight.copy_(vectors[torch.randperm(len(vectors))[:256]])
    return write_checkpoint(tmp_path_factory.mktemp("tokenizers") / request.param, config.to_json(), model.state_dict())


def _natural(count: int, side: int = 128) -> torch.Tensor:
    return natural_pictures(count, side, seed=0)


def _pixels(count: int, side: int = 128) -> Pixels:
    return _natural(count, side).numpy()


@pytest.mark.parametrize(
    ("dtype", "least"), [(torch.float32, 0.999), (torch.float16, 0.98), (torch.bfloat16, 0.9)], ids=str
)
@pytest.mark.parametrize("side", [128, 112])
def test_codes_are_nearly_those_of_the_cpu(folder: Path, dtype: torch.dtype, least: float, side: int) -> None:
    pixels = _pixels(6, side)
    on_cpu, on_gpu = ImageTokenizer.load(folder), ImageTokenizer.load(folder, "cuda", dtype, batch_size=4)
    assert len(np.unique(on_cpu.encode(pixels))) > 50
    assert on_gpu.agreement(on_cpu, pixels) >= least
    codes = on_gpu.encode(pixels)
    assert (codes.shape, codes.dtype) == ((6, side // 4, side // 4), np.int32)
    assert on_gpu.decode(codes).shape == pixels.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_codes_on_a_gpu_do_not_depend_on_the_rest_of_the_batch(folder: Path, dtype: torch.dtype) -> None:
    pixels = _pixels(11)
    tokenizer = ImageTokenizer.load(folder, "cuda", dtype, batch_size=4)
    together = tokenizer.encode(pixels)
    np.testing.assert_array_equal(tokenizer.encode(pixels), together)
    np.testing.assert_array_equal(tokenizer.encode(pixels[::-1])[::-1], together)
    for index in (0, 5, 10):
        np.testing.assert_array_equal(tokenizer.encode(pixels[index : index + 1])[0], together[index])
    again = ImageTokenizer.load(folder, "cuda", dtype, batch_size=4)
    np.testing.assert_array_equal(again.encode(_pixels(2, 64)), tokenizer.encode(_pixels(2, 64)))
    np.testing.assert_array_equal(again.encode(pixels), together)


def test_a_picture_that_float16_cannot_hold_is_refused_by_number(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = VQGAN(CONFIG)
    with torch.no_grad():
        model.encoder.conv_in.weight.fill_(1e4)
    write_checkpoint(tmp_path / "loud", CONFIG.to_json(), model.state_dict())
    pixels = np.full((3, 128, 128, 3), 128, np.uint8)
    pixels[2] = 255
    ImageTokenizer.load(tmp_path / "loud", "cuda", torch.bfloat16).encode(pixels)
    with pytest.raises(FloatingPointError, match=r"picture 2 of 3: 'loud' .* torch.float16 cannot hold; load it with"):
        ImageTokenizer.load(tmp_path / "loud", "cuda", torch.float16).encode(pixels)


@pytest.mark.parametrize("graph", [False, True])
def test_any_number_of_items_passes_in_order_through_batches_of_one_size(graph: bool) -> None:
    seen: list[int] = []

    def function(batch: torch.Tensor) -> torch.Tensor:
        seen.append(len(batch))
        return batch.to(torch.int32).sum(1) * 2

    batches = FixedBatches(function, 7, torch.device("cuda"), graph=graph)
    items = np.random.default_rng(0).integers(0, 256, (50, 1000), dtype=np.uint8)
    for count in (1, 6, 7, 8, 50, 3):
        np.testing.assert_array_equal(batches(items[:count]), items[:count].sum(1, dtype=np.int32) * 2)
    np.testing.assert_array_equal(batches(items[:, ::3]), items[:, ::3].sum(1, dtype=np.int32) * 2)
    assert set(seen) == {7}
    assert len(seen) == (2 * 2 if graph else 1 + 1 + 1 + 2 + 8 + 1 + 8)
