"""Pictures to codes, encoding alone, against the package's own modules: `python -m benchmarks.image_encode`.

Input: pictures made by rule (natural_pictures.py) and, with `--pictures`, those of a folder. Weights: the network of the
released VQGAN f16/16384 with random ones, for the released file cannot be part of this repository, and for its codebook
latents of other pictures, drawn at random: entries lie as close to each other as latents do, so codes change more easily than
a trained codebook's; and the shipped `drawings`, which is trained.

On a GPU, theirs is the package's loop in batches of 64 with pictures already on the GPU: float32, TF32 (what torch does with
float32 convolutions unless told not to), and float16, channels_last and compiled. Ours is `ImageTokenizer.encode`, from an
array in host memory to an array of codes. Without a GPU both sides are float32 modules with a tiny network.
`--breakdown` prints where ours spends its time.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks.measuring import close, medians, result
from benchmarks.natural_pictures import natural_pictures
from pipelines.tokenizers.checkpoint import write_checkpoint
from pipelines.tokenizers.vqgan import VQGAN, ImageTokenizer, ImageTokenizerConfig, TowerConfig, as_images

_TOWER = TowerConfig(ch=128, ch_mult=(1, 1, 2, 2, 4), num_res_blocks=2, attn_resolutions=(16,))
F16 = ImageTokenizerConfig(
    encoder=_TOWER, decoder=_TOWER, z_channels=256, embed_dim=256, codebook_size=16384, resolution=256
)
GFLOP = 140.6
"""Of one picture of 256 x 256 through F16's encoder and the search in its codebook."""
_SMALL = TowerConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1)
TINY = ImageTokenizerConfig(encoder=_SMALL, decoder=_SMALL, z_channels=8, embed_dim=4, codebook_size=64, resolution=32)
THEIR_BATCH = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pictures", type=Path, help="a folder of pictures to measure equal codes on, besides")
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--repeat", type=int, default=7)
    parser.add_argument("--sustained-s", type=float, default=5.0)
    parser.add_argument("--no-compile", action="store_true", help="leave out their compiled side, which takes a minute")
    parser.add_argument("--breakdown", action="store_true")
    parser.add_argument("--quick", action="store_true", help="a tiny network, a few small pictures")
    arguments = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if arguments.quick or device.type == "cpu":
        arguments.count, arguments.repeat, arguments.sustained_s = 8, 3, 0.5
    config = TINY if arguments.quick or device.type == "cpu" else F16
    pictures = natural_pictures(arguments.count, config.resolution, seed=1, device=device)
    sets = {"pictures by rule": pictures}
    if arguments.pictures:
        sets["pictures of the folder"] = read(arguments.pictures, config.resolution).to(device)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = random_checkpoint(Path(temporary) / "random", config, sets, device)
        if device.type == "cpu":
            close(on_cpu(folder, pictures, arguments.repeat))
            return
        results = on_gpu(folder, sets, arguments)
    close(results)


def read(folder: Path, side: int) -> Tensor:
    """The pictures of a folder, their middle square scaled: uint8 [N, side, side, 3]."""
    squares = []
    for path in sorted(folder.iterdir()):
        with Image.open(path) as picture:
            least = min(picture.size)
            left, top = ((length - least) // 2 for length in picture.size)
            square = picture.convert("RGB").crop((left, top, left + least, top + least)).resize((side, side))
        squares.append(torch.from_numpy(np.array(square)))
    return torch.stack(squares)


@torch.inference_mode()
def random_checkpoint(
    folder: Path, config: ImageTokenizerConfig, sets: dict[str, Tensor], device: torch.device
) -> Path:
    """Random weights; the codebook is latents of other pictures: half by rule, half pieces of the folder's, if there are."""
    model = VQGAN(config).eval().to(device)
    batches = [*natural_pictures(4 * THEIR_BATCH, config.resolution, seed=2, device=device).split(THEIR_BATCH)]
    if (folders := sets.get("pictures of the folder")) is not None:
        # Mirrored and cut elsewhere, so that no entry is the latent of a picture it is tried on.
        batches += [part.flip(2).roll(40, 1) for part in folders[: 4 * THEIR_BATCH].split(THEIR_BATCH)]
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        latents = [model.latents(as_images(batch)).permute(0, 2, 3, 1).flatten(0, 2) for batch in batches]
    vectors = torch.cat(latents)
    entries = vectors[torch.randperm(len(vectors), device=device)[: config.codebook_size]]
    model.quantize.embedding.weight[: len(entries)] = entries
    return write_checkpoint(folder, config.to_json(), model.state_dict())


def on_cpu(folder: Path, pictures: Tensor, repeat: int) -> list[dict[str, object]]:
    """Our `encode` against the modules, one picture at a time; float32 both."""
    tokenizer = ImageTokenizer.load(folder)
    pixels = pictures.numpy()
    with torch.inference_mode():
        expected = package(tokenizer.model, pictures, torch.float32, 1).numpy()
        equal = (tokenizer.encode(pixels) == expected).mean()
        seconds = medians(
            lambda: tokenizer.encode(pixels),
            lambda: package(tokenizer.model, pictures, torch.float32, 1),
            repeat=repeat,
        )
    ours, theirs = (len(pixels) / median for median in seconds)
    return [result("image encode, tiny network, CPU", ours, theirs, "images/s", checked=f"{equal:.2%} of codes equal")]


@torch.inference_mode()
def package(model: VQGAN, pictures: Tensor, dtype: torch.dtype, batch_size: int = THEIR_BATCH) -> Tensor:
    """The package's own loop: uint8 [N, H, W, 3] to codes [N, R, C]."""
    parts = []
    for batch in pictures.split(batch_size):
        images = as_images(batch, dtype)
        # Channels last in memory suits float16; the package itself, and float32, have them first.
        latents = model.latents(images.contiguous() if dtype is torch.float32 else images)
        parts.append(model.quantize(latents.float())[2][2])
    return torch.cat(parts)


def on_gpu(folder: Path, sets: dict[str, Tensor], arguments: argparse.Namespace) -> list[dict[str, object]]:
    """Speed on the pictures by rule, equal codes on all sets, then the sustained speed."""
    exact = ImageTokenizer.load(folder, "cuda")
    half = ImageTokenizer.load(folder, "cuda", torch.float16)
    brain = ImageTokenizer.load(folder, "cuda", torch.bfloat16)
    model = exact.model
    low = copy.deepcopy(model).half().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    low.quantize.float()
    low.latents = torch.compile(low.latents)  # type: ignore[method-assign]

    def with_tf32(allowed: bool) -> Callable[[Tensor], Tensor]:
        def run(pictures: Tensor) -> Tensor:
            with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=allowed):
                return package(model, pictures, torch.float32)

        return run

    theirs = {"float32": with_tf32(False), "TF32": with_tf32(True)}
    if not arguments.no_compile:
        theirs["float16, compiled"] = lambda pictures: package(low, pictures, torch.float16)
    ours = {"float32": exact, "float16": half, "bfloat16": brain}
    arrays = {name: pictures.cpu().numpy() for name, pictures in sets.items()}
    equal: dict[str, str] = {}
    for name, pictures in sets.items():
        whole = pictures[: len(pictures) // THEIR_BATCH * THEIR_BATCH]  # Their compiled side takes one shape.
        reference = theirs["float32"](whole).cpu().numpy()
        for label, side in theirs.items():
            share = (side(whole).cpu().numpy() == reference).mean()
            equal[f"theirs {label}"] = equal.get(f"theirs {label}", "") + f" {share:.2%} of {name};"
        for label, tokenizer in ours.items():
            share = (tokenizer.encode(arrays[name][: len(whole)]) == reference).mean()
            equal[f"ours {label}"] = equal.get(f"ours {label}", "") + f" {share:.2%} of {name};"
        print(name, len(whole), "pictures,", len(np.unique(reference)), "codes in use", equal, flush=True)

    pictures = sets["pictures by rule"]
    array = arrays["pictures by rule"]
    few = 2 * THEIR_BATCH  # Enough for the slow sides.
    sides: dict[str, tuple[Callable[[], object], int]] = {}
    for label, side in theirs.items():
        part = pictures[:few] if label == "float32" else pictures
        sides[f"theirs {label}"] = (lambda side=side, part=part: side(part).cpu()), len(part)  # type: ignore[misc]
    for label, tokenizer in ours.items():
        given = array[:few] if label == "float32" else array
        sides[f"ours {label}"] = (lambda tokenizer=tokenizer, given=given: tokenizer.encode(given)), len(given)  # type: ignore[misc]
    seconds = medians(*(run for run, _ in sides.values()), repeat=arguments.repeat)
    rates = {label: items / median for (label, (_, items)), median in zip(sides.items(), seconds, strict=True)}
    lasting = sustained(lambda: half.encode(array), arguments.sustained_s, len(array))
    results = []

    def compare(label: str, other: str, rate: float, what: str) -> None:
        checked = f"codes equal to the package's float32: ours{equal[f'ours {label}']} theirs{equal[f'theirs {other}']}"
        results.append(result(what, rate, rates[f"theirs {other}"], "images/s", checked=checked.rstrip(";")))
        print(results[-1], flush=True)

    compare(
        "float32", "float32", rates["ours float32"], "image encode, f16/16384, float32 against the package's float32"
    )
    for other in theirs:
        compare(
            "float16", other, rates["ours float16"], f"image encode, f16/16384, float16 against the package's {other}"
        )
    name = f"image encode, f16/16384, float16 for {arguments.sustained_s:g} s on end against the package's TF32"
    compare("float16", "TF32", lasting, name)
    results.append(shipped(sets))
    print(results[-1], flush=True)
    print(f"ours: {lasting * GFLOP / 1000:.0f} TFLOP/s sustained", flush=True)
    if arguments.breakdown:
        breakdown(half, pictures[:THEIR_BATCH])
    return results


def sustained(run: Callable[[], object], seconds: float, items: int) -> float:
    """Items a second over at least so many seconds: a GPU that is busy for long lowers its clocks."""
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < seconds:
        run()
        done += items
    return done / (time.perf_counter() - began)


def shipped(sets: dict[str, Tensor]) -> dict[str, object]:
    """The trained `drawings`: float16 against float32, codes and speed."""
    exact, half = ImageTokenizer.load("drawings", "cuda"), ImageTokenizer.load("drawings", "cuda", torch.float16)
    said = []
    for name, pictures in sets.items():
        array = pictures.cpu().numpy()
        said.append(f"{half.agreement(exact, array):.2%} of {name}")
    fast, slow = medians(lambda: half.encode(array), lambda: exact.encode(array), repeat=3)
    checked = f"codes equal to its own float32: {'; '.join(said)}"
    rates = len(array) / fast, len(array) / slow
    return result("image encode, drawings, float16 against our float32", *rates, "images/s", checked=checked)


@torch.inference_mode()
def breakdown(tokenizer: ImageTokenizer, pixels: Tensor) -> None:
    """Print the time of each step of one batch, each alone in a graph, and what it reaches."""
    from pipelines.tokenizers.vqgan_encoder import FusedEncoder
    from pipelines.tokenizers.vqgan_kernels import nearest, stem

    encoder = tokenizer._on_gpu.function  # type: ignore[union-attr]
    assert isinstance(encoder, FusedEncoder)
    x = stem(pixels, *encoder.stem)
    print(f"{'stem':24} {_milliseconds(lambda: stem(pixels, *encoder.stem)):8.3f} ms -> {list(x.values.shape)}")
    for layer in encoder.layers:
        y = layer(x)
        name = type(layer).__name__.strip("_")
        took = _milliseconds(lambda layer=layer, x=x: layer(x))  # type: ignore[misc]
        print(f"{name:24} {took:8.3f} ms -> {list(y.values.shape)}")
        x = y
    latents = encoder.latents(pixels).flatten(0, 2)
    took = _milliseconds(lambda: encoder.last.products(encoder.norm(x)).float() + encoder.last.bias)
    print(f"{'last':24} {took:8.3f} ms")
    print(f"{'nearest':24} {_milliseconds(lambda: nearest(latents, encoder.codebook)):8.3f} ms")
    print(f"{'all':24} {_milliseconds(lambda: encoder(pixels)):8.3f} ms", flush=True)


def _milliseconds(run: Callable[[], object], repeat: int = 9) -> float:
    """Median time of the GPU for one run, without that to launch its kernels."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    times = []
    for _ in range(repeat):
        began, ended = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        began.record()
        graph.replay()
        ended.record()
        torch.cuda.synchronize()
        times.append(began.elapsed_time(ended))
    return statistics.median(times)


if __name__ == "__main__":
    main()
