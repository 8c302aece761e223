"""Responses drawn from a policy, with what is learned from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from lit_core.generation import Completion, SamplingParams, TorchEngine
from lit_core.generation.requests import FinishReason, StepHook
from lit_core.samplers import mix_seed
from lit_rl.functional.forest import Forest
from lit_rl.functional.losses import overlong_penalty
from lit_rl.modules.config import RolloutConfig
from lit_rl.modules.layout import Sequences
from lit_rl.modules.policy import Policy
from lit_rl.modules.scoring import Scorer
from lit_rl.problems import Problem, ProblemBatch


@dataclass
class Rollout:
    """Responses and their rewards, a row each; rows of a group have the same prompt.

    Args:
        problems: Problem of each row.
        texts: Text of each response, without its end token.
        sequences: Token ids of prompts and responses.
        rewards: Reward of each response, as its task gives it.
        responses: Long ``(B, T)``, padded on the right.
        mask: Bool ``(B, T)``, True up to and including the end token.
        log_probs: Of the engine, at the sampling temperature ``(B, T)``.
        truncated: Bool ``(B,)``, True where a response reached the most tokens.
        scores: Reward of each response ``(B,)``, float32, without what is lost by length.
        new_tokens: Tokens that were drawn for them; what a branch has from its parent is not.
        parents: Row that each response branched off, -1 for none, Long ``(B,)``; None where all are independent.
        branches: At which token, Long ``(B,)``.
        credit: Advantages that the sampler has found ``(B, T)``; None where they follow from the rewards.
    """

    problems: list[Problem]
    texts: list[str]
    sequences: Sequences
    rewards: list[float]
    responses: Tensor
    mask: Tensor
    log_probs: Tensor
    truncated: Tensor
    scores: Tensor
    new_tokens: int = 0
    parents: Tensor | None = None
    branches: Tensor | None = None
    credit: Tensor | None = None

    def __len__(self) -> int:
        return len(self.problems)

    @property
    def group_ids(self) -> Tensor:
        """Number of each row's group, Long ``(B,)``."""
        return torch.tensor(list(self.sequences.groups), dtype=torch.long, device=self.mask.device)

    def take(self, rows: Sequence[int]) -> "Rollout":
        """Some of the rows."""
        index = torch.tensor(list(rows), dtype=torch.long, device=self.mask.device)
        forest = None if self.parents is None else self.forest.take(index)
        return Rollout(
            [self.problems[row] for row in rows],
            [self.texts[row] for row in rows],
            self.sequences.take(rows),
            [self.rewards[row] for row in rows],
            self.responses[index],
            self.mask[index],
            self.log_probs[index],
            self.truncated[index],
            self.scores[index],
            self.new_tokens,
            None if forest is None else forest.parents,
            None if forest is None else forest.branches,
            None if self.credit is None else self.credit[index],
        )

    @property
    def forest(self) -> Forest:
        """Which prefixes the responses share."""
        lengths, groups = self.mask.sum(1), self.group_ids
        if self.parents is None or self.branches is None:
            return Forest.independent(lengths, groups)
        return Forest(self.parents, self.branches, lengths, groups)

    def state(self) -> dict[str, Any]:
        """Everything in plain containers and tensors, for a checkpoint."""
        fields = {name: value for name, value in vars(self).items() if name not in ("problems", "sequences")}
        problems = [{**vars(problem), "row": dict(problem.row)} for problem in self.problems]
        return {**fields, "problems": problems, "sequences": dict(vars(self.sequences))}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> "Rollout":
        """What :meth:`state` has written."""
        fields: dict[str, Any] = {
            name: value.to(device) if isinstance(value, Tensor) else value for name, value in state.items()
        }
        fields["problems"] = [Problem(**problem) for problem in state["problems"]]
        fields["sequences"] = Sequences(**state["sequences"])
        return cls(**fields)


def draw(
    policy: Policy,
    batch: ProblemBatch,
    params: SamplingParams,
    samples: int,
    seed: int,
    kv_tokens: int,
    hook: StepHook | None = None,
) -> list[Completion]:
    """Draw responses; a problem's depend on the seed and its id alone.

    Args:
        policy: Draws them.
        batch: Problems.
        params: How.
        samples: Responses a problem.
        seed: Seed of this draw.
        kv_tokens: Most tokens of the engine's cache.
        hook: Step hook of the engine.
    """
    seeds = [mix_seed(seed, problem.id, number) for problem in batch.problems for number in range(samples)]
    engine = TorchEngine(policy.model, policy.tokenizer, kv_tokens)
    with policy.whole_head():
        return engine.generate(batch.prompts, params, samples, seeds, hook=hook)


def sampling_params(config: RolloutConfig, end_ids: tuple[int, ...]) -> SamplingParams:
    """What the engine is told for training."""
    return SamplingParams(
        config.temperature, config.top_p, config.top_k, config.max_tokens, end_ids, tuple(config.stop_strings)
    )


def response_text(policy: Policy, tokens: Sequence[int]) -> str:
    """Text of a response without its end token; other special tokens stay visible, as they are mistakes."""
    tokens = list(tokens[:-1]) if tokens and tokens[-1] in policy.end_ids else list(tokens)
    return policy.tokenizer.decode(tokens, skip_special_tokens=False)


def collect(
    policy: Policy,
    batch: ProblemBatch,
    config: RolloutConfig,
    seed: int,
    scorer: Scorer,
    device: torch.device,
    first_group: int = 0,
) -> Rollout:
    """Draw responses for training and score them.

    Args:
        policy: Draws them.
        batch: Problems, one group of responses each.
        config: How.
        seed: Seed of this draw.
        scorer: Gives the rewards.
        device: Where the tensors go.
        first_group: Number of the first group.
    """
    completions = draw(policy, batch, sampling_params(config, policy.end_ids), config.samples, seed, config.kv_tokens)
    problems = [problem for problem in batch.problems for _ in range(config.samples)]
    prompts = [prompt for prompt in batch.prompts for _ in range(config.samples)]
    groups = [first_group + number for number in range(len(batch)) for _ in range(config.samples)]
    return scored(policy, problems, prompts, groups, completions, config, scorer, device)


class Drawn(Protocol):
    """A response as an engine gives it."""

    tokens: list[int]
    log_probs: Tensor
    finish_reason: FinishReason


def scored(
    policy: Policy,
    problems: list[Problem],
    prompts: Sequence[Sequence[int]],
    groups: Sequence[int],
    drawn: Sequence[Drawn],
    config: RolloutConfig,
    scorer: Scorer,
    device: torch.device,
    judged: Sequence[tuple[str, float]] | None = None,
) -> Rollout:
    """Responses with their rewards.

    Args:
        policy: Has drawn them.
        problems: Of each response.
        prompts: Token ids that each stands behind.
        groups: Number of each one's group.
        drawn: The responses.
        config: How they were drawn.
        scorer: Gives the rewards.
        device: Where the tensors go.
        judged: Text and reward of each where they are known.
    """
    if judged is None:
        texts = [response_text(policy, response.tokens) for response in drawn]
        rewards = scorer.rewards(problems, texts)
    else:
        texts, rewards = [text for text, _ in judged], [reward for _, reward in judged]
    scores = torch.tensor(rewards, dtype=torch.float32)
    lengths = torch.tensor([len(response.tokens) for response in drawn])
    if config.overlong_buffer:
        scores += overlong_penalty(lengths, config.max_tokens, config.overlong_buffer, config.overlong_factor)
    responses = pad_sequence([torch.tensor(response.tokens) for response in drawn], batch_first=True)
    log_probs = pad_sequence([response.log_probs for response in drawn], batch_first=True)
    mask = torch.arange(responses.shape[1]) < lengths[:, None]
    truncated = torch.tensor([response.finish_reason == "length" for response in drawn])
    sequences = Sequences(prompts, [response.tokens for response in drawn], groups)
    responses, mask, log_probs, truncated, scores = (
        tensor.to(device) for tensor in (responses, mask, log_probs, truncated, scores)
    )
    new_tokens = int(lengths.sum())
    return Rollout(problems, texts, sequences, rewards, responses, mask, log_probs, truncated, scores, new_tokens)


def informative(rollout: Rollout) -> list[int]:
    """Rows of the groups whose rewards differ."""
    spread: dict[int, set[float]] = {}
    for group, value in zip(rollout.sequences.groups, rollout.rewards, strict=True):
        spread.setdefault(group, set()).add(value)
    return [row for row, group in enumerate(rollout.sequences.groups) if len(spread[group]) > 1]


def renumbered(rollout: Rollout, first: int) -> Rollout:
    """Number the groups from ``first`` on, without gaps."""
    names = {group: first + number for number, group in enumerate(dict.fromkeys(rollout.sequences.groups))}
    rollout.sequences.groups = [names[group] for group in rollout.sequences.groups]
    return rollout


def joined(parts: Sequence[Rollout]) -> Rollout:
    """Rollouts one after the other, padded to the same length."""
    if len(parts) == 1:
        return parts[0]
    width = max(part.mask.shape[1] for part in parts)
    forest = Forest.concatenate([part.forest for part in parts])
    grown = any(part.parents is not None for part in parts)
    credited = all(part.credit is not None for part in parts)

    def padded(tensors: list[Tensor]) -> Tensor:
        return torch.cat([torch.nn.functional.pad(tensor, (0, width - tensor.shape[1])) for tensor in tensors])

    return Rollout(
        [problem for part in parts for problem in part.problems],
        [text for part in parts for text in part.texts],
        Sequences.concatenate([part.sequences for part in parts]),
        [value for part in parts for value in part.rewards],
        padded([part.responses for part in parts]),
        padded([part.mask for part in parts]),
        padded([part.log_probs for part in parts]),
        torch.cat([part.truncated for part in parts]),
        torch.cat([part.scores for part in parts]),
        sum(part.new_tokens for part in parts),
        forest.parents if grown else None,
        forest.branches if grown else None,
        padded([part.credit for part in parts if part.credit is not None]) if credited else None,
    )
