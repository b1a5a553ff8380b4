"""The text tokenizer: the library's own ids, and nothing in a text is a command."""

from __future__ import annotations

import importlib.util
import io
import pickle
import random
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.sequence import VocabularyError
from pipelines.tokenizers import sentencepiece as module
from pipelines.tokenizers.checkpoint import CheckpointError
from pipelines.tokenizers.sentencepiece import TextTokenizer

WORDS = ["le", "ciel", "est", "bleu;", "une", "pomme", "Straße", "данные", "数据", "naïve", "café", "12,5", "x=y?"]
WORDS += ["(oui)", "🙂", "l'eau\nfin", "de\tligne", "", "deux"]


@pytest.fixture(scope="module")
def mistral() -> TextTokenizer:
    return TextTokenizer.load("mistral-v1")


def trained(folder: Path, **options: Any) -> Path:
    rng = random.Random(3)
    sentences = [" ".join(rng.choices(WORDS, k=12)) for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, minloglevel=2, hard_vocab_limit=False, **options
    )
    path = folder / "tiny.model"
    path.write_bytes(model.getvalue())
    return path


def long_text(characters: int, seed: int = 7) -> str:
    rng = random.Random(seed)
    text = ""
    while len(text) < characters:
        text += rng.choice(WORDS) + rng.choice([" ", " ", " ", "  ", "\n", "", " \u2581 "])
    return text


def test_the_packaged_model_has_32000_pieces(mistral: TextTokenizer) -> None:
    assert (mistral.name, mistral.pieces) == ("mistral-v1", 32_000)
    assert mistral.sha256.startswith("dadfd56d766715c6")
    assert "mistral_common" not in sys.modules


@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\u2581")))
def test_text_survives_the_round_trip(mistral: TextTokenizer, text: str) -> None:
    (ids,) = mistral.encode([text])
    assert ids.dtype == np.int32
    assert mistral.decode(ids) == text


@pytest.mark.parametrize("text", ["</s>", "<s>", "<unk>", "<0x0A>", "<|end|>", "<|image|><|16|><|16|>", "[INST]"])
def test_what_looks_like_a_special_token_stays_text(mistral: TextTokenizer, text: str) -> None:
    (ids,) = mistral.encode([f"a {text} b"])
    assert not any(mistral.processor.is_control(int(i)) or mistral.processor.is_unknown(int(i)) for i in ids)
    assert len(ids) > 4
    assert mistral.decode(ids) == f"a {text} b"


def test_an_empty_text_has_no_ids(mistral: TextTokenizer) -> None:
    empty, word = mistral.encode(["", "mot"])
    assert (empty.shape, empty.dtype) == ((0,), np.int32)
    assert len(word) > 0
    assert mistral.encode([]) == []


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), characters=st.integers(1500, 12_000))
def test_long_texts_have_the_ids_of_the_whole(mistral: TextTokenizer, seed: int, characters: int) -> None:
    text = long_text(characters, seed)
    (ids,) = mistral.encode([text])
    assert mistral.divisible
    assert ids.tolist() == mistral.processor.encode(text)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "vocab_size": 150},
        {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"},
        {"model_type": "bpe", "vocab_size": 200, "treat_whitespace_as_suffix": True},
        {"model_type": "bpe", "vocab_size": 200, "split_by_whitespace": False},
        {"model_type": "bpe", "vocab_size": 200, "add_dummy_prefix": False},
        {"model_type": "bpe", "vocab_size": 200, "user_defined_symbols": ["ciel est", "▁"]},
        {"model_type": "unigram", "vocab_size": 120},
        {"model_type": "word", "vocab_size": 60},
        {"model_type": "char", "vocab_size": 60},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_any_model_gives_the_librarys_ids(options: dict[str, object], tmp_path: Path) -> None:
    tokenizer = TextTokenizer.load(trained(tmp_path, **options))
    texts = [long_text(9000), "", "court", " espace devant", long_text(3000, seed=8)]
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tiny.model"))
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [library.encode(text) for text in texts]
    assert tokenizer.name == "tiny"
    plain = options["model_type"] == "bpe" and len(options) == 2
    assert not plain or tokenizer.divisible


ALPHABETS = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.text(" \t\n\u3000\u2581ab0<>/s\u200d\u0301é中", max_size=30),
    st.lists(st.sampled_from([*WORDS, "</s>", "<unk>", "<0x0A>", "[INST]"])).map(" ".join),
)


@settings(max_examples=300, deadline=None)
@given(text=ALPHABETS)
def test_the_fast_engine_gives_the_librarys_ids(mistral: TextTokenizer, text: str) -> None:
    assert mistral.engine == "gigatoken"
    (ids,) = mistral.encode([text])
    assert (ids.tolist(), ids.dtype) == (mistral.processor.encode(text), np.int32)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "bpe", "vocab_size": 400, "byte_fallback": True}, "normalizes its text"),
        ({"model_type": "unigram", "vocab_size": 120, "normalization_rule_name": "identity"}, "unigram"),
        ({"model_type": "bpe", "vocab_size": 150, "normalization_rule_name": "identity"}, "byte_fallback"),
    ],
)
def test_a_model_that_the_fast_engine_cannot_encode_is_left_to_the_library(
    options: dict[str, object], reason: str, tmp_path: Path
) -> None:
    model = trained(tmp_path, **options)
    assert TextTokenizer.load(model).engine == "sentencepiece"
    with pytest.raises(CheckpointError, match=f"gigatoken cannot encode with this model: .*{reason}"):
        TextTokenizer.load(model, engine="gigatoken")


def test_user_defined_pieces_have_the_librarys_ids(tmp_path: Path) -> None:
    model = trained(
        tmp_path,
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        user_defined_symbols=["[REF]", "ciel est"],
    )
    tokenizer = TextTokenizer.load(model)
    texts = ["le ciel est bleu", "une [REF] pomme", "une pomme"]
    assert tokenizer.engine == "gigatoken"
    assert [ids.tolist() for ids in tokenizer.encode(texts)] == [tokenizer.processor.encode(text) for text in texts]


def test_an_engine_that_errs_is_caught_by_the_check(mistral: TextTokenizer) -> None:
    tokenizer = TextTokenizer.from_bytes(mistral.model, "erring")
    assert tokenizer.fast
    tokenizer.encode(["une pomme"] * 1024)
    tokenizer.fast._processor = sentencepiece.SentencePieceProcessor(
        model_file=str(Path(mistral_common_folder()) / "mistral_instruct_tokenizer_240323.model.v3")
    )
    with pytest.raises(CheckpointError, match=r"set tokenizers\.text\.engine to sentencepiece"):
        tokenizer.encode(["une pomme"] * 1024)


def mistral_common_folder() -> str:
    spec = importlib.util.find_spec("mistral_common")
    assert spec is not None
    assert spec.submodule_search_locations
    return f"{spec.submodule_search_locations[0]}/data"


def test_ids_outside_the_pieces_are_refused(mistral: TextTokenizer) -> None:
    for outside in (32_000, -1):
        with pytest.raises(VocabularyError, match=f"text id {outside} lies outside the 32000 pieces of mistral-v1"):
            mistral.decode([300, outside])


def test_control_pieces_decode_to_nothing(mistral: TextTokenizer) -> None:
    (ids,) = mistral.encode(["mot"])
    assert mistral.decode([1, *ids.tolist(), 2]) == "mot"


def test_a_tokenizer_travels_to_workers(mistral: TextTokenizer) -> None:
    copy = pickle.loads(pickle.dumps(mistral))
    assert copy.sha256 == mistral.sha256
    assert copy.encode(["Une pomme"])[0].tolist() == mistral.encode(["Une pomme"])[0].tolist()


def test_a_missing_or_broken_model_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match=r"mistral-v2.*mistral-v1"):
        TextTokenizer.load("mistral-v2")
    broken = tmp_path / "broken.model"
    for content in (b"", b"no model", random.Random(4).randbytes(2000)):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match="not a SentencePiece model"):
            TextTokenizer.load(broken)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match="pip install --no-deps mistral-common"):
        TextTokenizer.load("mistral-v1")
