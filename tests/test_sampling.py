"""One rule chooses tokens, in Python by the library's processors, and in C. A draw depends on seed, position and logits."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers import grammar_of
from models import VOCAB, compiled_only, tiny
from offramp.decode.sampling import Sampler, Sampling, chooser, noise
from offramp.errors import NothingFits
from offramp.model.compiled.runtime import Compiled

NEAR = 2e-5  # a border this near may be on either side of a token, by rounding


def runtime() -> Compiled:
    made = tiny("llama/compiled").runtime
    assert isinstance(made, Compiled)
    return made


def some_settings(draw: random.Random) -> Sampler:
    return Sampler(
        draw.choice([0.0, 0.4, 1.0, 1.0, 1.8]),
        draw.choice([0, 0, 1, 7, 50, VOCAB, 1000]),
        draw.choice([1.0, 1.0, 0.95, 0.6, 0.02]),
        draw.choice([0.0, 0.0, 0.01, 0.3, 1.0]),
        draw.getrandbits(64) - 2**63,
        draw.choice([1.0, 1.0, 1.3, 0.7]),
    )


def some_logits(generator: torch.Generator, width: float) -> Tensor:
    """Logits; in one case of two, most are −inf, as those of a sketch are."""
    logits = torch.randn(VOCAB, generator=generator) * width
    if width > 3:
        logits[torch.randperm(VOCAB, generator=generator)[: VOCAB - 20]] = -torch.inf
    return logits


def near(settings: Sampler) -> list[Sampler]:
    """Settings whose borders are a little elsewhere."""
    return [
        replace(
            settings,
            temperature=settings.temperature * (1 + by),
            top_p=min(1.0, settings.top_p * (1 + by)),
            min_p=min(1.0, settings.min_p * (1 - by)),
        )
        for by in (NEAR, -NEAR)
    ]


@compiled_only
def test_c_chooses_as_the_librarys_processors_do() -> None:
    choose, draw, generator = runtime().choose, random.Random(1), torch.Generator().manual_seed(1)
    differing = 0
    for case in range(3000):
        settings, logits = some_settings(draw), some_logits(generator, draw.uniform(0.5, 6))
        ids = [draw.randrange(VOCAB) for _ in range(draw.choice([0, 1, 30]))] if case % 7 else [3, 3, 5]
        wanted, found = settings(logits, ids), choose(settings, ids, logits)
        if found != wanted:
            differing += 1
            assert len({other(logits, ids) for other in (settings, *near(settings))}) > 1, settings
        if settings.temperature and case % 3 == 0:  # what is drawn is what the processors keep
            loose = near(settings)[0]
            assert loose._processors(torch.tensor([ids]).long(), logits[None])[0, found] > -torch.inf
    assert differing < 10


@compiled_only
def test_c_leaves_the_logits_and_says_when_there_is_no_token() -> None:
    choose, logits = runtime().choose, torch.randn(VOCAB)
    kept = logits.clone()
    for settings in (Sampling(), Sampling(0.8, 5, 0.9, 0.1, 3, 1.2)):
        assert choose(settings, [1, 2], logits) >= 0
        assert torch.equal(logits, kept)
        assert choose(settings, [1, 2], logits, np.array([0, 1], np.uint32)) == 32
        assert choose(settings, [1, 2], logits, np.zeros(1, np.uint32)) == -2
        assert choose(settings, [1, 2], torch.full((VOCAB,), torch.nan)) == -1
    with pytest.raises(ValueError, match="rows of 5"):
        choose(Sampling(), [], torch.zeros(5))
    with pytest.raises(ValueError, match="no token 260"):
        choose(Sampling(), [260], logits)


@compiled_only
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0, 40, 0.9, seed=4, repetition_penalty=1.2)])
def test_c_chooses_among_what_a_schema_allows(sampling: Sampling) -> None:
    schema = {"enum": ["left", "right", "lever", 12]}
    backbone, choose = tiny("llama/compiled"), runtime().choose
    grammar, ids, logits = grammar_of(backbone, schema, 2, sampling), [7, 7], torch.randn(12, VOCAB)
    assert grammar.choose == sampling.chooser()
    for row in logits[:8]:
        chosen = grammar(row, ids)
        allowed = grammar.allowed(ids)
        assert allowed[chosen // 32] >> chosen % 32 & 1
        assert choose(sampling, ids, row, allowed) == chosen
        if chosen == backbone.tokenizer.eos_token_id:
            break
        ids.append(chosen)
    row = logits[0].where(torch.arange(VOCAB) == 7, -torch.inf)
    assert choose(sampling, ids[:2], row, grammar.allowed(ids[:2])) == -2
    with pytest.raises(NothingFits):
        grammar(row, ids[:2])


def test_noise_is_a_function_of_seed_and_position() -> None:
    whole = noise(5, 9, 1000)
    assert whole.dtype == np.float32
    assert np.array_equal(whole[:77], noise(5, 9, 77))
    assert np.array_equal(whole, noise(5 + 2**64, 9, 1000))
    for other in (noise(6, 9, 1000), noise(5, 10, 1000), noise(-5, 9, 1000)):
        assert abs(np.corrcoef(whole, other)[0, 1]) < 0.1
    logits = torch.randn(1000)
    draws = [Sampler(1.0, seed=5)(logits, ids) for ids in ([0] * 9, [1] * 9)]
    assert draws[0] == draws[1] == chooser([], 5)(logits, [2] * 9) == int((logits.numpy() + whole).argmax())


def test_noise_is_that_of_known_hashes() -> None:
    """The first numbers of splitmix64 from 0, and of MurmurHash3's fmix32 from 1."""
    from offramp.decode.sampling import _fmix32, _mixed

    keys = [_mixed(0x9E3779B97F4A7C15 * place % 2**64) for place in (1, 2, 3)]
    assert keys == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert _fmix32(np.array([0, 1], np.uint32)).tolist() == [0, 0x514E28B7]


def test_noise_has_the_gumbel_distribution() -> None:
    """A Kolmogorov-Smirnov test of 500 positions of 400 tokens, and of the largest of each position."""
    values = np.stack([noise(2, position, 400) for position in range(500)]).astype(np.float64)
    for numbers in (values.ravel(), values.max(1) - np.log(400)):
        even = np.sort(np.exp(-np.exp(-numbers)))
        distance = np.abs(even - np.arange(1, len(even) + 1) / len(even)).max()
        assert distance < 1.95 / np.sqrt(len(even))  # p = 0.001


def test_a_temperature_near_0_draws_the_most_probable_token() -> None:
    logits = torch.randn(100) * 100
    assert Sampler(1e-300)(logits, []) == Sampler()(logits, []) == int(logits.argmax())
