from dataclasses import replace
from itertools import combinations
from typing import Any

import pytest
import torch

from lit_core.backbones import BackboneConfig, Lora
from lit_core.generation import Completion, SamplingParams
from lit_rl.modules.config import EvaluationConfig
from lit_rl.modules.evaluation import (
    DistributionHook,
    ProblemResult,
    merged,
    per_problem,
    problem_results,
    summarise,
    tensor_metrics,
)
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import draw
from lit_rl.problems import Problem, ProblemBatch


def brute_pass(rewards: list[float], k: int) -> float:
    """Share of the subsets of ``k`` responses in which one is right."""
    subsets = list(combinations(rewards, k))
    return sum(max(subset) == 1 for subset in subsets) / len(subsets)


def result(number: int, rewards: list[float], answers: list[str | None] | None = None) -> ProblemResult:
    answers = ["x"] * len(rewards) if answers is None else answers
    return ProblemResult(number, rewards, answers, list(range(1, len(rewards) + 1)), 1)


@pytest.mark.parametrize("rewards", [[0, 0, 0, 0, 0], [1, 0, 0, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 1, 1], [0.5, 0, 1]])
def test_pass_at_k_is_that_of_all_subsets(rewards: list[float]) -> None:
    found = per_problem([result(4, rewards)])
    powers = [k for k in (2, 4, len(rewards)) if k <= len(rewards)]
    assert {name for name in found if name.startswith("pass")} == {f"pass@{k}" for k in powers}
    for k in powers:
        assert found[f"pass@{k}"]["4"] == pytest.approx(brute_pass(rewards, k))
    assert found["success"]["4"] == pytest.approx(brute_pass(rewards, 1))
    assert found["reward"]["4"] == pytest.approx(sum(rewards) / len(rewards))


def test_metrics_worked_out_by_hand() -> None:
    results = [
        result(7, [1, 0, 1, 1], ["1+2", None, "2+1", "1+2"]),
        result(8, [0, 0, 0, 1], ["5", "5", None, "3"]),
    ]
    results[0].sums, results[1].sums = {"entropy": 5.0}, {"entropy": 25.0}
    assert per_problem(results) == {
        "reward": {"7": 0.75, "8": 0.25},
        "success": {"7": 0.75, "8": 0.25},
        "invalid": {"7": 0.25, "8": 0.25},
        "distinct_correct": {"7": 2.0, "8": 1.0},
        "pass@2": {"7": 1.0, "8": 0.5},
        "pass@4": {"7": 1.0, "8": 1.0},
        "maj@4": {"7": 1.0, "8": 0.0},  # "5" is given twice
    }
    found = summarise(results)
    assert found["success"] == 0.5
    assert found["pass@2"] == 0.75
    assert found["length"] == 2.5
    assert found["truncated"] == 0.25
    assert found["entropy"] == 30 / 20  # over all tokens
    metrics = tensor_metrics(results, "val")
    assert metrics["val/maj@4"] == 0.5
    assert per_problem([result(1, [1.0])]).keys() == {"reward", "success", "invalid", "distinct_correct"}


def test_results_of_ranks_are_merged_by_id() -> None:
    parts = [[result(3, [1.0]), result(1, [0.0])], [result(2, [1.0]), result(3, [1.0])]]
    assert [one.id for one in merged(parts)] == [1, 2, 3]


def test_responses_become_results_problem_by_problem() -> None:
    problems = [Problem(number, "countdown_bare", "", {"numbers": [1, 2], "target": 3}) for number in (5, 6)]
    completions = [
        Completion([1] * length, torch.zeros(length), reason, {"entropy": torch.full((length,), 0.5)})  # type: ignore[arg-type]
        for length, reason in ((2, "stop"), (3, "length"), (4, "length"), (1, "length"))
    ]
    first, second = problem_results(problems, completions, ["1+2", "2 + 1", "3", "1-2"], [1.0, 1.0, 0.0, 0.0])
    assert (first.id, first.answers, first.lengths, first.truncated) == (5, ["1+2", "2+1"], [2, 3], 1)
    assert (second.answers, second.truncated, second.correct) == ([None, "1-2"], 2, 0)
    assert (first.sums, second.sums) == ({"entropy": 2.5}, {"entropy": 2.5})
    assert first.texts == ["1+2", "2 + 1"]


def test_the_hook_measures_the_distributions_that_tokens_are_drawn_from() -> None:
    config = EvaluationConfig(tail_top_k=5, region_top_k=3, region_top_p=0.7)
    policy = Policy("nano-qwen3", BackboneConfig(seed=3), Lora(), temperature=0.5)
    batch = ProblemBatch([Problem(0, "countdown", "")], [[5, 6, 7]])
    hook = DistributionHook(config, policy.temperature)
    (drawn,) = draw(policy, batch, SamplingParams(0.5, max_tokens=4), 1, 0, 1000, hook)
    logits: Any = policy.model(input_ids=torch.tensor([[5, 6, 7, *drawn.tokens]])).logits[0, 2:-1]
    for step, row in enumerate((logits.double() / 0.5).softmax(-1).detach()):
        best = row.sort(descending=True).values
        inside = best[:3] / best[:3].sum()
        expected = {
            "entropy": -(row * row.log()).sum(),
            "tail_mass": 1 - best[:5].sum(),
            "region_entropy": -(inside * inside.log()).sum(),
            "region_size": min((best.cumsum(0) < 0.7).sum() + 1, torch.tensor(256)),
        }
        for name, value in expected.items():
            assert float(drawn.scalars[name][step]) == pytest.approx(float(value), abs=1e-4), name


def test_the_hook_takes_a_vocabulary_smaller_than_its_regions() -> None:
    found = DistributionHook(EvaluationConfig(), 1.0)(torch.zeros(2, 3), torch.zeros(2, dtype=torch.long))
    assert found["tail_mass"].tolist() == [0.0, 0.0]
    assert found["region_size"].tolist() == [3.0, 3.0]


def test_domains_are_told_apart_averaged_and_the_worst_is_named() -> None:
    results = [result(1, [1, 0]), result(2, [0.5, 1]), result(3, [0, 0.25]), result(4, [0, 1])]
    for one, domain, entropy in zip(results, ("math", "chat", "chat", "math"), (3.0, 6.0, 12.0, 9.0), strict=True):
        one.domain, one.sums = domain, {"entropy": entropy}
    results[1].lengths = [4, 6]
    found = summarise(results)
    plain = summarise([replace(one, domain="") for one in results])
    assert {name: found[name] for name in plain} == plain
    assert found.keys() - plain.keys() == {
        *(f"{domain}/{metric}" for domain in ("math", "chat") for metric in ("reward", "success", "length", "entropy")),
        *(f"{kind}/{metric}" for kind in ("domain_mean", "domain_worst") for metric in ("reward", "success")),
    }
    assert (found["math/reward"], found["chat/reward"]) == (0.5, (0.75 + 0.125) / 2)
    assert (found["math/success"], found["chat/success"]) == (0.5, 0.25)
    assert (found["math/length"], found["chat/length"]) == (1.5, 13 / 4)
    assert (found["math/entropy"], found["chat/entropy"]) == (12 / 6, 18 / 13)
    assert found["domain_mean/reward"] == (0.5 + 0.4375) / 2
    assert (found["domain_worst/reward"], found["domain_worst/success"]) == (0.4375, 0.25)
    assert per_problem(results)["chat/reward"] == {"2": 0.75, "3": 0.125}
