"""The contract of a sequence: interleave, its inverse, and the grammar."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipelines.interleave import EncodedSpan, deinterleave, interleave, sequence_length
from pipelines.sequence import Grammar, Modality, SequenceError, Vocabulary, VocabularyError, parse

VOCABULARY = Vocabulary(
    text_pieces=300,
    text_sha256="t",
    image_codebook_size=32,
    image_sha256="i",
    audio_codebook_size=16,
    audio_codebooks=3,
    audio_sha256="a",
    preprocessing={"image": {"version": 1}},
)


def _codes(modality: Modality, shape: tuple[int, ...], seed: int) -> EncodedSpan:
    size = (300, 32, 16)[modality]
    codes = np.random.default_rng(seed).integers(0, size, shape, dtype=np.int32)
    return EncodedSpan(modality=modality, codes=codes)


@st.composite
def documents(draw: st.DrawFn) -> list[EncodedSpan]:
    spans: list[EncodedSpan] = []
    for _ in range(draw(st.integers(1, 6))):
        media = [Modality.IMAGE, Modality.AUDIO]
        after_text = bool(spans) and spans[-1].modality is Modality.TEXT
        modality = draw(st.sampled_from(media if after_text else [Modality.TEXT, *media]))
        seed = draw(st.integers(0, 2**32 - 1))
        if modality is Modality.TEXT:
            shape: tuple[int, ...] = (draw(st.integers(1, 40)),)
        elif modality is Modality.IMAGE:
            shape = (draw(st.integers(1, 64)), draw(st.integers(1, 64)))
        else:
            shape = (draw(st.sampled_from([1, 2, 63, 64, 65, 128, 4096]) | st.integers(1, 200)), 3)
        spans.append(_codes(modality, shape, seed))
    return spans


@given(documents())
def test_deinterleave_gives_back_what_interleave_was_given(spans: list[EncodedSpan]) -> None:
    sequence = interleave(VOCABULARY, spans)
    back = deinterleave(VOCABULARY, sequence.token_ids, sequence.modality_ids)
    assert [s.modality for s in back] == [s.modality for s in spans]
    assert all(np.array_equal(a.codes, b.codes) for a, b in zip(back, spans, strict=True))
    assert len(sequence.token_ids) == sequence_length(spans)
    assert parse(VOCABULARY, sequence.token_ids, sequence.modality_ids) == sequence.spans


@given(documents())
def test_every_id_is_in_the_range_of_its_modality(spans: list[EncodedSpan]) -> None:
    sequence = interleave(VOCABULARY, spans)
    for modality in Modality:
        ids = sequence.token_ids[sequence.modality_ids == modality]
        assert ((ids >= 0) & (ids < VOCABULARY.size(modality))).all()


@given(documents())
@settings(max_examples=30)
def test_the_grammar_walks_every_interleaved_document_token_by_token(spans: list[EncodedSpan]) -> None:
    sequence = interleave(VOCABULARY, spans)
    grammar = Grammar(VOCABULARY)
    for token_id, modality in zip(sequence.token_ids, sequence.modality_ids, strict=True):
        allowed = grammar.allowed
        assert allowed is not None
        assert allowed.modality == modality
        assert int(token_id) in allowed
        grammar.advance(int(token_id), int(modality))
    assert grammar.ended
    assert grammar.allowed is None
    assert grammar.spans == sequence.spans


@given(st.integers(0, 2**32 - 1), st.integers(1, 60))
def test_whatever_the_grammar_allows_is_what_interleave_makes(seed: int, texts: int) -> None:
    """A random walk over what is allowed is a document that interleave makes again, token for token."""
    rng = np.random.default_rng(seed)
    grammar = Grammar(VOCABULARY)
    tokens, modalities = [], []
    while (allowed := grammar.allowed) is not None:
        low, high = allowed.ranges[rng.integers(len(allowed.ranges))]
        if len(tokens) > texts and VOCABULARY.end in allowed:
            low, high = VOCABULARY.end, VOCABULARY.end + 1
        token = int(rng.integers(low, min(high, low + 4) if allowed.modality is Modality.TEXT else high))
        grammar.advance(token, allowed.modality)
        tokens.append(token)
        modalities.append(int(allowed.modality))
    token_ids, modality_ids = np.array(tokens, np.int32), np.array(modalities, np.int8)
    again = interleave(VOCABULARY, deinterleave(VOCABULARY, token_ids, modality_ids))
    assert np.array_equal(again.token_ids, token_ids)
    assert np.array_equal(again.modality_ids, modality_ids)


@given(documents(), st.data())
def test_a_changed_token_is_another_document_or_refused(spans: list[EncodedSpan], data: st.DataObject) -> None:
    sequence = interleave(VOCABULARY, spans)
    at = data.draw(st.integers(0, len(sequence.token_ids) - 1))
    token_ids, modality_ids = sequence.token_ids.copy(), sequence.modality_ids.copy()
    token_ids[at] = data.draw(st.integers(-2, 400).filter(lambda t: t != token_ids[at]))
    modality_ids[at] = data.draw(st.integers(0, 3))
    try:
        back = deinterleave(VOCABULARY, token_ids, modality_ids)
    except SequenceError:
        return
    again = interleave(VOCABULARY, back)
    assert np.array_equal(again.token_ids, token_ids)
    assert np.array_equal(again.modality_ids, modality_ids)


@pytest.mark.parametrize(
    ("spans", "message"),
    [
        ([], "at least one span"),
        ([_codes(Modality.TEXT, (3,), 0), _codes(Modality.TEXT, (3,), 1)], "span 1 .text.: follows another text"),
        ([_codes(Modality.TEXT, (0,), 0)], "span 0 .text.: codes have shape"),
        ([_codes(Modality.IMAGE, (65, 2), 0)], "<|65|> does not exist"),
        ([_codes(Modality.AUDIO, (4097, 3), 0)], "4097 frames"),
        ([_codes(Modality.AUDIO, (4, 2), 0)], "2 codebooks, but the vocabulary has 3"),
        ([EncodedSpan(modality=Modality.IMAGE, codes=np.array([[32]], np.int32))], "code 32 lies outside 0..31"),
        ([EncodedSpan(modality=Modality.TEXT, codes=np.array([300], np.int32))], "code 300 lies outside 0..299"),
    ],
)
def test_what_breaks_the_contract_is_refused_by_name(spans: list[EncodedSpan], message: str) -> None:
    with pytest.raises(SequenceError, match=message.replace("|", r"\|")):
        interleave(VOCABULARY, spans)


def test_a_document_that_stops_early_names_where() -> None:
    sequence = interleave(VOCABULARY, [_codes(Modality.IMAGE, (2, 2), 0)])
    with pytest.raises(SequenceError, match="position 6: the document stops before"):
        parse(VOCABULARY, sequence.token_ids[:6], sequence.modality_ids[:6])


def test_vocabularies_differ_in_what_they_say_and_only_there() -> None:
    other = Vocabulary.from_dict(
        VOCABULARY.to_dict() | {"audio_sha256": "b", "preprocessing": {"image": {"version": 2}}}
    )
    assert VOCABULARY.differences(other) == ["audio_sha256: a, b", "preprocessing.image.version: 1, 2"]
    assert VOCABULARY.fingerprint != other.fingerprint
    with pytest.raises(VocabularyError, match="dataset X and recipe Y have different vocabularies"):
        VOCABULARY.require_same(other, this="dataset X", that="recipe Y")
    same = Vocabulary.from_dict(VOCABULARY.to_dict())
    assert same.fingerprint == VOCABULARY.fingerprint
    VOCABULARY.require_same(same, this="a", that="b")


def test_the_view_of_the_first_codebooks_has_a_fingerprint_of_its_own() -> None:
    view = VOCABULARY.first_codebooks(2)
    assert view.audio_vocab_size == 32
    assert view.fingerprint == VOCABULARY.first_codebooks(2).fingerprint != VOCABULARY.fingerprint
    with pytest.raises(VocabularyError, match="cannot keep 4 audio codebooks of 3"):
        VOCABULARY.first_codebooks(4)
