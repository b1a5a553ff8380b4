"""Tokens are drawn from exactly the distribution that the settings state."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pipelines.generate import GenerateError, Sampling
from pipelines.generate.sampling import distribution, penalize, sample


def _uniforms(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _theory(logits: list[float], sampling: Sampling) -> list[float]:
    """The stated order of operations, one list element at a time, in float64."""
    top = max(logits)
    weights = {
        i: torch.tensor((x - top) / sampling.temperature, dtype=torch.float64).exp().item()
        for i, x in enumerate(logits)
    }
    ranked = sorted(weights, key=lambda i: -weights[i])[: sampling.top_k]
    total, mass, kept = sum(weights[i] for i in ranked), 0.0, []
    for i in ranked:
        if sampling.top_p == 1 or mass < sampling.top_p * total:
            kept.append(i)
        mass += weights[i]
    kept = [i for i in kept if weights[i] >= sampling.min_p * weights[kept[0]]]
    total = sum(weights[i] for i in kept)
    return [weights[i] / total if i in kept else 0.0 for i in range(len(logits))]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=2.0, top_k=7),
        Sampling(top_p=0.8),
        Sampling(min_p=0.2),
        Sampling(temperature=1.3, top_k=15, top_p=0.9, min_p=0.05),
    ],
    ids=str,
)
def test_frequencies_match_theory_by_chi_square(sampling: Sampling) -> None:
    draws = 60_000
    logits = torch.randn(24, generator=torch.Generator().manual_seed(1)) * 1.5
    expected = torch.tensor(_theory(logits.tolist(), sampling)) * draws
    counts = torch.bincount(sample(logits.expand(draws, -1), sampling, _uniforms(draws)), minlength=24)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    statistic = float(((counts - expected)[possible] ** 2 / expected[possible]).sum())
    freedom = torch.tensor(float(possible.sum() - 1))
    # Upper tail of chi-square: the regularised incomplete gamma function.
    assert torch.special.gammaincc(freedom / 2, torch.tensor(statistic / 2)) > 0.001


# Logits from a grid, all different and no border nearer than rounding reaches.
_LOGITS = st.lists(st.integers(-400, 400), min_size=1, max_size=40, unique=True).map(lambda xs: [x / 64 for x in xs])


@given(
    rows=st.lists(_LOGITS, min_size=1, max_size=3),
    top_k=st.none() | st.integers(1, 50),
    top_p=st.just(1.0) | st.floats(0.01, 0.99),
    min_p=st.just(0.0) | st.floats(0.001, 1),
    temperature=st.sampled_from([0.25, 1.0, 3.0]),
)
def test_the_support_is_exact(
    rows: list[list[float]], top_k: int | None, top_p: float, min_p: float, temperature: float
) -> None:
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    for logits in rows:
        weights, candidates = distribution(torch.tensor([logits]), sampling)
        dense = torch.zeros(len(logits))
        dense[torch.arange(len(logits)) if candidates is None else candidates[0]] = weights[0]
        expected = torch.tensor(_theory(logits, sampling))
        torch.testing.assert_close(dense / dense.sum(), expected, atol=1e-5, rtol=1e-4)
        assert torch.equal(dense > 0, expected > 0) or _near_a_border(logits, sampling)


def _near_a_border(logits: list[float], sampling: Sampling) -> bool:
    """Whether a cut falls so near a token's edge that float32 may see it on the other side."""
    supports = {
        tuple(
            p > 0
            for p in _theory(
                logits,
                Sampling(
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=min(1.0, sampling.top_p * (1 + shift)),
                    min_p=min(1.0, sampling.min_p * (1 + shift)),
                ),
            )
        )
        for shift in (-1e-5, 0.0, 1e-5)
    }
    return len(supports) > 1


@given(
    seed=st.integers(0, 999),
    temperature=st.sampled_from([1e-6, 1e-3, 1.0, 1e6]),
    scale=st.sampled_from([1e-3, 1.0, 1e4]),
)
def test_a_token_is_always_one_of_those_that_may_stand_there(seed: int, temperature: float, scale: float) -> None:
    logits = torch.randn(5, 33, generator=torch.Generator().manual_seed(seed)) * scale
    logits[:, ::4] = -torch.inf
    extremes = torch.tensor([0.0, 1 - 2**-53, 0.5, 1e-300, 0.999], dtype=torch.float64)
    for sampling in (Sampling(temperature=temperature), Sampling(temperature=temperature, top_k=9, top_p=0.7)):
        ids = sample(logits, sampling, extremes)
        assert ((ids >= 0) & (ids < 33) & (ids % 4 != 0)).all()


@pytest.mark.parametrize("spread", [0.1, 1.0, 4.0])
def test_top_p_keeps_the_same_ids_of_a_large_vocabulary_as_a_full_sort(spread: float) -> None:
    logits = torch.randn(3, 5000, generator=torch.Generator().manual_seed(8)) * spread
    weights, candidates = distribution(logits, Sampling(top_p=0.9))
    assert candidates is not None
    ranked, order = logits.double().softmax(-1).sort(dim=-1, descending=True)
    for b in range(3):
        kept = set(order[b, ranked[b].cumsum(0) - ranked[b] < 0.9].tolist())
        # float32 may see the ids next to the border on its other side.
        assert len(kept ^ set(candidates[b, weights[b] > 0].tolist())) <= 2


def test_temperature_0_and_top_1_take_the_likeliest() -> None:
    logits = torch.randn(50, 19, generator=torch.Generator().manual_seed(4))
    for sampling in (Sampling(temperature=0), Sampling(top_k=1), Sampling(temperature=1e-6), Sampling(min_p=1.0)):
        assert torch.equal(sample(logits, sampling, _uniforms(50)), logits.argmax(-1))


def test_a_penalty_lowers_what_is_held_and_nothing_else() -> None:
    logits, held = torch.tensor([[2.0, -2.0, 0.0, 3.0]]), torch.tensor([[True, True, True, False]])
    assert penalize(logits, held, 2.0).tolist() == [[1.0, -4.0, 0.0, 3.0]]
    assert torch.equal(penalize(logits, held, 1.0), logits)


def test_rows_are_drawn_on_their_own() -> None:
    logits = torch.randn(8, 30, generator=torch.Generator().manual_seed(5))
    uniforms = _uniforms(8)
    for sampling in (Sampling(), Sampling(top_k=6, top_p=0.9)):
        together = sample(logits, sampling, uniforms)
        alone = [sample(logits[b : b + 1], sampling, uniforms[b : b + 1]) for b in range(8)]
        assert torch.equal(together, torch.cat(alone))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -1.0}, "temperature is -1"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_k": 0}, "top_k is 0"),
        ({"top_p": 0.0}, "top_p is 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"min_p": -0.1}, "min_p is -0.1"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0"),
        ({"guidance": -1.0}, "guidance is -1"),
        ({"guidance": float("nan")}, "guidance is nan"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(GenerateError, match=message):
        Sampling(**settings)  # type: ignore[arg-type]
