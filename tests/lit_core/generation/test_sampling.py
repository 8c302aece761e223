from typing import Any

import pytest
import torch
from scipy.stats import chisquare, kstest

from lit_core.errors import InputError
from lit_core.generation.sampling import SamplingParams, choose, uniforms

MASK = (1 << 64) - 1


def splitmix(state: int) -> int:
    """The generator as it is published, on whole numbers without a sign."""
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def test_draws_are_those_of_splitmix64() -> None:
    seeds, steps = torch.tensor([0, 1, 2**62, -5]), torch.tensor([0, 7, 3, 2])
    expected = [
        (splitmix((splitmix(seed & MASK) + step) & MASK) >> 11) / 2**53
        for seed, step in zip(seeds.tolist(), steps.tolist(), strict=True)
    ]
    assert uniforms(seeds, steps).tolist() == expected


def test_draws_are_uniform_over_steps_and_over_seeds() -> None:
    many = torch.arange(20_000)
    assert kstest(uniforms(torch.zeros_like(many), many), "uniform").pvalue > 0.01
    assert kstest(uniforms(many, torch.zeros_like(many)), "uniform").pvalue > 0.01
    following = uniforms(torch.zeros(20_001, dtype=torch.long), torch.arange(20_001))
    assert abs(float(torch.corrcoef(torch.stack([following[:-1], following[1:]]))[0, 1])) < 0.03


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
    draws = uniforms(torch.full((count,), 11), torch.arange(count))
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
    draws = uniforms(torch.arange(64), torch.zeros(64, dtype=torch.long))
    for params, scale in ((SamplingParams(temperature=0.5, top_p=0.6), 0.5), (SamplingParams(temperature=0), 1.0)):
        found = choose(logits, draws, params)
        logs = (logits / scale).log_softmax(-1)
        torch.testing.assert_close(found.log_probs, logs.gather(1, found.tokens[:, None])[:, 0])
    assert torch.equal(found.tokens, logits.argmax(-1))


def test_a_row_does_not_depend_on_the_others() -> None:
    logits = torch.randn(32, 50, generator=torch.Generator().manual_seed(1))
    draws = uniforms(torch.arange(32), torch.full((32,), 5))
    for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3)):
        together = choose(logits, draws, params).tokens
        alone = [choose(logits[row : row + 1], draws[row : row + 1], params).tokens for row in range(32)]
        assert torch.equal(together, torch.cat(alone))


def test_what_has_no_weight_is_never_chosen() -> None:
    logits = torch.tensor([[0.0, -torch.inf, 0.0, -torch.inf]])
    for draw in (0.0, 0.25, 0.5, 1 - 2**-53):
        for params in (SamplingParams(), SamplingParams(top_p=0.9), SamplingParams(top_k=3)):
            assert int(choose(logits, torch.tensor([draw], dtype=torch.float64), params).tokens) in (0, 2)


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -1.0), ("temperature", float("nan")), ("top_p", 0.0), ("top_k", 0), ("max_tokens", 0),
     ("stop_strings", ("",))],
)  # fmt: skip
def test_mistakes(field: str, value: Any) -> None:
    with pytest.raises(InputError, match=f"field '{field}'"):
        SamplingParams(**{field: value})
