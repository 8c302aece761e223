from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest

from lit_core.errors import InputError
from lit_core.generation.sampling import SamplingParams, choose, keys, uniforms

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """The generator as it is published, on whole numbers without a sign."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_draws_are_those_of_splitmix64() -> None:
    seeds, steps = torch.tensor([0, 1, 2**62, -5]), torch.tensor([0, 7, 3, 2])
    found = uniforms(keys(seeds, steps), 3)
    for row, (seed, step) in enumerate(zip(seeds.tolist(), steps.tolist(), strict=True)):
        key = splitmix((splitmix(seed & MASK) + step) & MASK)
        stream = [splitmix((key + number * 0x9E3779B97F4A7C15) & MASK) for number in range(3)]
        assert found[row].tolist() == [((state >> 11) + 0.5) / 2**53 for state in stream]


def test_draws_are_uniform_over_steps_over_seeds_and_along_a_stream() -> None:
    many, none = torch.arange(20_000), torch.zeros(20_000, dtype=torch.long)
    assert kstest(uniforms(keys(none, many), 1)[:, 0], "uniform").pvalue > 0.01
    assert kstest(uniforms(keys(many, none), 1)[:, 0], "uniform").pvalue > 0.01
    assert kstest(uniforms(keys(none[:1], none[:1]), 20_000)[0], "uniform").pvalue > 0.01
    following = uniforms(keys(torch.zeros(20_001, dtype=torch.long), torch.arange(20_001)), 2)
    assert abs(float(torch.corrcoef(torch.stack([following[:-1, 0], following[1:, 0]]))[0, 1])) < 0.03
    assert abs(float(torch.corrcoef(following.T)[0, 1])) < 0.03


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(top_k=4),
        SamplingParams(top_p=0.7),
        SamplingParams(temperature=1.5, top_k=6, top_p=0.8),
    ],
)
def test_frequencies(params: SamplingParams) -> None:
    logits = torch.tensor([2.0, -1, 0.5, 0.4, -3, 1.2, 0, -0.2])
    count = 40_000
    draws = keys(torch.full((count,), 11), torch.arange(count))
    found = choose(logits.expand(count, -1), draws, params).tokens.bincount(minlength=8)
    expected = (logits / params.temperature).softmax(0)
    order = expected.argsort(descending=True)
    if params.top_k is not None:
        expected[order[params.top_k :]] = 0
        expected /= expected.sum()
    before = expected[order].cumsum(0) - expected[order]
    expected[order[before >= params.top_p]] = 0
    expected /= expected.sum()
    inside = expected > 0
    assert int(found[~inside].sum()) == 0
    assert chisquare(found[inside], (count * expected[inside].double() / expected[inside].double().sum())).pvalue > 1e-3


def test_log_probs_are_those_of_the_whole_vocabulary_under_the_temperature() -> None:
    logits = torch.randn(64, 100, generator=torch.Generator().manual_seed(0))
    draws = keys(torch.arange(64), torch.zeros(64, dtype=torch.long))
    for params, scale in ((SamplingParams(temperature=0.5, top_p=0.6), 0.5), (SamplingParams(temperature=0), 1.0)):
        found = choose(logits, draws, params)
        logs = (logits / scale).log_softmax(-1)
        torch.testing.assert_close(found.log_probs, logs.gather(1, found.tokens[:, None])[:, 0])
    assert torch.equal(found.tokens, logits.argmax(-1))


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(1))
    draws = keys(torch.arange(32), torch.full((32,), 5))
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3)):
        together = choose(logits, draws, params).tokens
        alone = [choose(logits[row : row + 1], draws[row : row + 1], params).tokens for row in range(32)]
        assert torch.equal(together, torch.cat(alone))


def test_what_has_no_weight_is_never_chosen() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    many = keys(torch.arange(1000), torch.zeros(1000, dtype=torch.long))
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3)):
        assert set(choose(logits.expand(1000, -1), many, params).tokens.tolist()) <= {0, 2}


def test_rounding_hardly_ever_turns_a_choice_over() -> None:  # an inverted cumulative sum turns about 1 in 100
    logits = torch.randn(20_000, 400, generator=torch.Generator().manual_seed(0))
    many = keys(torch.arange(20_000), torch.zeros(20_000, dtype=torch.long))
    rounded = logits * (1 + 1e-6 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)))
    assert (
        int((choose(logits, many, SamplingParams()).tokens != choose(rounded, many, SamplingParams()).tokens).sum()) < 5
    )


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", 0), ("max_tokens", 0),
     ("stop_strings", ("",))],
)  # fmt: skip
def test_mistakes(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"field '{field}'"):
        SamplingParams(**{field: value})
