"""What a policy's sampled responses are worth: success, pass@k, diversity, and how its probabilities lie."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import Tensor

from lit_core.generation import Completion
from lit_rl.functional.exploration import entropy, region_size, trust_region_entropy
from lit_rl.functional.metrics import majority, pass_at_k, powers_up_to
from lit_rl.modules.config import EvaluationConfig
from lit_rl.problems import DOMAIN_SUMMARIES, Problem
from lit_rl.rewards.tasks import TASKS

SOLVED = 1 - 1e-6  # rewards of verifiable tasks from here on count as right
COMPARED = ("reward", "success")  # metrics that are told for each domain


@dataclass
class ProblemResult:
    """Responses to one problem.

    Args:
        id: Of the problem.
        rewards: Of each response.
        answers: Of each response; None where it has none that obeys the rules.
        lengths: Tokens of each response.
        truncated: How many reached the most tokens.
        sums: Sums over all their tokens of what the step hook has computed.
        texts: Of each response.
        domain: That of the problem; empty where there is but one.
    """

    id: int
    rewards: list[float]
    answers: list[str | None]
    lengths: list[int]
    truncated: int
    sums: dict[str, float] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    domain: str = ""

    @property
    def correct(self) -> int:
        """Responses that are right."""
        return sum(reward >= SOLVED for reward in self.rewards)


class DistributionHook:
    """Scalars of each step's distribution: entropies, the mass of the tail, the size of the region.

    Args:
        config: Which regions.
        temperature: Divides the logits, as in training.
    """

    def __init__(self, config: EvaluationConfig, temperature: float) -> None:
        self.config, self.temperature = config, temperature

    def __call__(self, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        config, logits = self.config, logits.float() / self.temperature
        kept = min(max(config.tail_top_k, config.region_top_k), logits.shape[-1])
        best = logits.topk(kept, dim=-1).values
        tail = 1 - (best[..., : config.tail_top_k].logsumexp(-1) - logits.logsumexp(-1)).exp()
        region = best[..., : config.region_top_k]
        return {
            "entropy": entropy(logits),
            "tail_mass": tail.clamp(min=0),
            # of a single token what the trust-region entropy makes of it: the min-entropy
            "region_entropy": entropy(region) if region.shape[-1] > 1 else trust_region_entropy(logits, top_k=1),
            "region_size": region_size(logits, config.region_top_p).float(),
        }


def problem_results(
    problems: Sequence[Problem],
    completions: Sequence[Completion],
    texts: Sequence[str],
    rewards: Sequence[float],
    answers: Sequence[str] | None = None,
) -> list[ProblemResult]:
    """Sort responses, which stand problem by problem, into results.

    Args:
        problems: In order.
        completions: As many of each problem.
        texts: Of the completions.
        rewards: Of each.
        answers: The part of each text that is its answer; None takes all of it.
    """
    parts = texts if answers is None else answers
    samples = len(completions) // max(1, len(problems))
    results = []
    for number, problem in enumerate(problems):
        part = slice(number * samples, (number + 1) * samples)
        drawn = completions[part]
        sums = {name: sum(float(c.scalars[name].sum()) for c in drawn) for name in drawn[0].scalars}
        answer = TASKS[problem.task].answer
        results.append(
            ProblemResult(
                problem.id,
                list(rewards[part]),
                [answer(problem.row, text) for text in parts[part]],
                [len(completion.tokens) for completion in drawn],
                sum(completion.finish_reason == "length" for completion in drawn),
                sums,
                list(texts[part]),
                problem.domain,
            )
        )
    return results


def per_problem(results: Sequence[ProblemResult]) -> dict[str, dict[str, float]]:
    """Metrics that are means over problems, by problem; those of a domain's problems as ``<domain>/<metric>`` too."""
    found: dict[str, dict[str, float]] = {"reward": {}, "success": {}, "invalid": {}, "distinct_correct": {}}
    for result in results:
        count, name = len(result.rewards), str(result.id)
        found["reward"][name] = fmean(result.rewards)
        found["success"][name] = result.correct / count
        found["invalid"][name] = sum(answer is None for answer in result.answers) / count
        right = {a for a, reward in zip(result.answers, result.rewards, strict=True) if reward >= SOLVED}
        found["distinct_correct"][name] = float(len(right))
        for k in powers_up_to(count)[1:]:
            found.setdefault(f"pass@{k}", {})[name] = pass_at_k(count, result.correct, k)
        if count > 1:
            found.setdefault(f"maj@{count}", {})[name] = float(majority(result.answers, result.rewards) >= SOLVED)
        if result.domain:
            for metric in COMPARED:
                found.setdefault(f"{result.domain}/{metric}", {})[name] = found[metric][name]
    return found


def summarise(results: Sequence[ProblemResult]) -> dict[str, float]:
    """All metrics: means over problems, over responses (lengths) and over tokens (distributions).

    ``correct_length`` is missing where no response is right.
    Where problems have domains, also ``<domain>/reward``, ``success``, ``length`` and ``entropy``, and of the first two
    the mean over the domains (``domain_mean/reward``) and the lowest of them (``domain_worst/reward``).
    """
    found = {name: fmean(values.values()) for name, values in per_problem(results).items()}
    found |= _over_tokens(results)
    domains = list(dict.fromkeys(result.domain for result in results if result.domain))
    for domain in domains:
        measured = _over_tokens([result for result in results if result.domain == domain])
        found |= {f"{domain}/{name}": measured[name] for name in ("length", "entropy") if name in measured}
    for metric in COMPARED if domains else ():
        values = [found[f"{domain}/{metric}"] for domain in domains]
        found |= {f"{DOMAIN_SUMMARIES[0]}/{metric}": fmean(values), f"{DOMAIN_SUMMARIES[1]}/{metric}": min(values)}
    return found


def _over_tokens(results: Sequence[ProblemResult]) -> dict[str, float]:
    """Metrics that are no means over problems."""
    lengths = [length for result in results for length in result.lengths]
    found = {"length": fmean(lengths), "truncated": sum(result.truncated for result in results) / len(lengths)}
    correct = [n for r in results for n, reward in zip(r.lengths, r.rewards, strict=True) if reward >= SOLVED]
    if correct:
        found["correct_length"] = fmean(correct)
    for name in results[0].sums:
        found[name] = sum(result.sums[name] for result in results) / max(1, sum(lengths))
    return found


def merged(parts: Sequence[Sequence[ProblemResult]]) -> list[ProblemResult]:
    """Results of all ranks, each problem once, by its id."""
    found = {result.id: result for part in parts for result in part}
    return [found[number] for number in sorted(found)]


def tensor_metrics(results: Sequence[ProblemResult], prefix: str) -> dict[str, Tensor]:
    """Metrics as the logger wants them."""
    return {f"{prefix}/{name}": torch.tensor(value) for name, value in summarise(results).items()}
