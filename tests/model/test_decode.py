"""The decoding step against the model's own decoding. Where Triton is installed, TRITON_INTERPRET=1 runs it without a GPU."""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

from model import KeyValueCache, UnifiedTransformer
from tests.model.cases import random_document, tiny_config

pytest.importorskip("triton", reason="Triton comes with torch's CUDA builds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1", allow_module_level=True)

from model import triton_decode_attention  # noqa: E402
from model.decode import DecodingStep, DecodingStepError  # noqa: E402

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_rope": False},
        {"qk_norm": True},
        {"hidden_size": 96, "num_attention_heads": 1},
        {"hidden_size": 192, "num_attention_heads": 2, "qk_norm": True},
        {"hidden_size": 256, "num_attention_heads": 2},
    ],
    ids=str,
)
def test_a_step_computes_what_the_model_does_for_rows_of_different_lengths(
    rows: int, changes: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_decode_attention, "chunk_of", lambda rows: 4)
    model = UnifiedTransformer(tiny_config(**changes), seed=0).to(DEVICE).eval()
    exact = UnifiedTransformer(tiny_config(**changes), seed=0).double().eval()
    generator = torch.Generator().manual_seed(rows)
    lengths, steps = torch.tensor([7, 1, 4, 11, 8][:rows]), 4
    ids, kinds = (x.view(rows, -1) for x in random_document(rows * (11 + steps), generator))
    caches = []
    for each in (model, exact):
        cache = KeyValueCache(
            model.config, rows, 20, each.modality_embedding.weight.device, each.final_norm.weight.dtype
        )
        device = cache.lengths.device
        with torch.no_grad():
            each.prefill(ids[:, :11].to(device), kinds[:, :11].to(device), cache, lengths.to(device))
        caches.append(cache)
    alive = torch.ones(rows, dtype=torch.int64, device=DEVICE)
    step = DecodingStep(model, caches[0], alive)
    with torch.no_grad():
        for t in range(steps):
            if t == steps - 1:
                alive[0] = 0
            new = ids[:, 11 + t], kinds[:, 11 + t]
            found = step(*(x.to(DEVICE) for x in new)).double().cpu()
            right = exact.decode_step(*new, caches[1])
            assert (found - right).norm() <= 2e-6 * right.norm()
    grown = torch.full_like(lengths, steps)
    grown[0] -= 1
    assert torch.equal(caches[0].lengths.cpu(), lengths + grown)
    assert caches[0].occupied == caches[1].occupied == 11 + steps


def test_what_a_step_cannot_run_is_refused() -> None:
    model = UnifiedTransformer(tiny_config(norm_placement="reordered"), seed=0).to(DEVICE)
    with pytest.raises(DecodingStepError, match=r"norm_placement is 'reordered'.*use model.decode_step"):
        DecodingStep(model, KeyValueCache(model.config, 1, 8, DEVICE))


@pytest.mark.parametrize(
    ("want", "packages", "count"),
    [(["text"], [], 8), (["text", "image"], ["taming", "encodec"], 16)],
    ids=["text", "text and picture"],
)
def test_a_seed_reproduces_the_bytes_of_all_files(
    want: list[str], packages: list[str], count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looked for rather than imported: encodec wants torchaudio, which Braid does without.
    needed = ["pydantic", "yaml", "soundfile", "sentencepiece", "rich", *packages]
    if missing := [package for package in needed if importlib.util.find_spec(package) is None]:
        pytest.skip(f"not installed here: {', '.join(missing)}")
    from pipelines.generate import Generator, Request, Sampling, decoding, write
    from pipelines.recipe import read_recipe
    from pipelines.tokenize.recipe import TokenizeRecipe
    from pipelines.tokenize.tokenizers import Tokenizers
    from tests.pipelines import tiny

    steps: list[DecodingStep] = []

    def remembered(*arguments: object) -> DecodingStep:
        steps.append(DecodingStep(*arguments))  # type: ignore[arg-type]
        return steps[-1]

    monkeypatch.setattr(decoding, "DecodingStep", remembered)
    if packages:
        recipe = tiny.tiny_recipe(tmp_path)
    else:
        source = f"{{name: lines, reader: jsonl, path: {tmp_path}/lines.jsonl}}"
        model = tiny.text_tokenizer(tmp_path / "text.model")
        text = f"dataset: {tmp_path}/tokens\nsources: [{source}]\ntokenizers: {{text: {{model: {model}}}}}\n"
        (tmp_path / "recipe.yaml").write_text(text + "sequence_length: 256\n")
        recipe = read_recipe(TokenizeRecipe, tmp_path / "recipe.yaml")
    tokenizers = Tokenizers.load(recipe)
    vocabulary = tokenizers.vocabulary(recipe)
    sizes = {f"{name}_vocab_size": max(1, vocabulary.size(m)) for m, name in enumerate(("text", "image", "audio"))}
    kind = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    config = tiny_config(**sizes, max_sequence_length=200, initializer_std=0.3)

    def files(name: str, seed: int) -> dict[str, bytes]:
        """A model loaded anew, a cache and a step of its own."""
        generator = Generator(UnifiedTransformer(config, seed=1).to(DEVICE, kind), vocabulary, tokenizers)
        request = Request(want=want, samples=2, seed=seed, sampling=Sampling(top_p=0.95), max_tokens=32)
        made = generator.generate(["the quick brown fox", ""], request)
        write(made, tmp_path / name, generator.settings(request))
        return {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}

    first, again, other = files("first", 7), files("again", 7), files("other", 8)
    assert len(steps) == 3, "each went through the step"
    assert all((step._graph is not None) == (DEVICE == "cuda") for step in steps)
    assert len(first) == count, "each span and its record, of four samples"
    assert first == again
    assert set(first.values()).isdisjoint(other.values())
