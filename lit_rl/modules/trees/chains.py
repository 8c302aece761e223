"""Credit from continuations of a response's prefixes (SPO-chain, FR3E), drawn behind responses."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from lit_core.generation import Completion, Request, TorchEngine
from lit_core.samplers import mix_seed
from lit_rl.functional.chain_advantages import chain_cuts, fr3e, spo_chain, uncertain_tokens
from lit_rl.modules.config import RolloutConfig
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import Rollout, collect, response_text, sampling_params, scored
from lit_rl.modules.scoring import Scorer
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.modules.trees.selection import CORRECT
from lit_rl.problems import Problem, ProblemBatch

CONTINUATION = 103  # name of the stream of their seeds


@dataclass
class _State:
    """A prefix that continuations are drawn from."""

    problem: Problem
    prompt: Sequence[int]
    tokens: list[int]
    seed: int
    chain: int = 0
    step: int = 0


def collect_chains(
    policy: Policy,
    batch: ProblemBatch,
    config: TreeConfig,
    rollout: RolloutConfig,
    seed: int,
    scorer: Scorer,
    device: torch.device,
) -> Rollout:
    """SPO-chain: responses, each segment of which is credited with what it adds to the share of right continuations."""
    found = collect(policy, batch, rollout, seed, scorer, device)
    mask, lengths = found.mask.cpu(), found.mask.sum(1).cpu()
    uncertain = uncertain_tokens(found.log_probs.cpu(), mask, config.certain)
    cuts = chain_cuts(uncertain, lengths, config.every)
    states, places = list[_State](), list[tuple[int, int]]()
    for row, (problem, prompt, response) in enumerate(
        zip(found.problems, found.sequences.prompts, found.sequences.responses, strict=True)
    ):
        for column, cut in enumerate(cuts[row].tolist()):
            if cut < len(response):
                draw = mix_seed(seed, problem.id, row % rollout.samples, column, CONTINUATION)
                states.append(_State(problem, prompt, list(response[:cut]), draw))
                places.append((row, column))
    drawn = _continue(policy, states, config.children, rollout)
    judged = _judged(policy, states, drawn, scorer)
    values = torch.zeros(len(found), cuts.shape[1] + 1)
    values[:, -1] = found.scores.cpu()
    for (row, column), part in zip(places, judged, strict=True):
        values[row, column] = fmean(reward for _, reward in part)
    credit = spo_chain(cuts, values, lengths, mask)
    found.credit = torch.where(uncertain, credit, 0.0).to(device)
    found.new_tokens += sum(len(completion.tokens) for part in drawn for completion in part)
    return found


def collect_fr3e(
    policy: Policy,
    batch: ProblemBatch,
    config: TreeConfig,
    rollout: RolloutConfig,
    seed: int,
    scorer: Scorer,
    device: torch.device,
) -> Rollout:
    """FR3E: continuations of a right and a wrong response from where they were least certain.

    A row is a continuation, what it continues belongs to its prompt, and the continuations of a prefix are a group.
    Prompts and prefixes whose rewards are all equal are left out; where that leaves nothing, the first responses are
    returned, with a credit of 0.
    """
    engine = TorchEngine(policy.model, policy.tokenizer, rollout.kv_tokens)
    seeds = [mix_seed(seed, problem.id, number) for problem in batch.problems for number in range(config.chains)]
    with policy.whole_head():
        first = engine.generate(batch.prompts, sampling_params(rollout, policy.end_ids), config.chains, seeds)
    owners = [number for number in range(len(batch)) for _ in range(config.chains)]
    problems, prompts = [batch.problems[number] for number in owners], [batch.prompts[number] for number in owners]
    begun = scored(policy, problems, prompts, owners, first, rollout, scorer, device)
    states = list[_State]()
    for number in range(len(batch)):
        rows = range(number * config.chains, (number + 1) * config.chains)
        for row in _contrast([begun.rewards[row] for row in rows], rows):
            states += _states(begun, row, first[row], config.points, mix_seed(seed, row % config.chains))
    drawn = _continue(policy, states, config.children, rollout)
    judged = _judged(policy, states, drawn, scorer)
    kept = [number for number, part in enumerate(judged) if len({reward for _, reward in part}) > 1]
    new = begun.new_tokens + sum(len(completion.tokens) for part in drawn for completion in part)
    if not kept:
        begun.credit, begun.new_tokens = torch.zeros_like(begun.log_probs), new
        return begun
    rows_of = [number for number in kept for _ in range(config.children)]
    found = scored(
        policy,
        [states[number].problem for number in rows_of],
        [[*states[number].prompt, *states[number].tokens] for number in rows_of],
        rows_of,
        [completion for number in kept for completion in drawn[number]],
        rollout,
        scorer,
        device,
        [pair for number in kept for pair in judged[number]],
    )
    chains, steps = (torch.tensor([getattr(states[n], name) for n in rows_of]) for name in ("chain", "step"))
    found.credit = fr3e(found.scores.cpu(), chains, steps, found.mask.cpu()).to(device)
    found.new_tokens = new
    return found


def _contrast(rewards: Sequence[float], rows: Sequence[int]) -> list[int]:
    """The first right and the first wrong response of a prompt; none where all are equal."""
    right = [row for row, reward in zip(rows, rewards, strict=True) if reward > CORRECT]
    wrong = [row for row, reward in zip(rows, rewards, strict=True) if reward <= CORRECT]
    return [right[0], wrong[0]] if right and wrong else []


def _states(begun: Rollout, row: int, response: Completion, points: int, seed: int) -> list[_State]:
    """The empty prefix and those before the least probable tokens, which grow."""
    order = response.log_probs[1:].argsort(stable=True)[:points] + 1
    cuts = [0, *sorted(order.tolist())]
    problem, prompt = begun.problems[row], begun.sequences.prompts[row]
    return [
        _State(problem, prompt, response.tokens[:cut], mix_seed(seed, problem.id, step, CONTINUATION), row, step)
        for step, cut in enumerate(cuts)
    ]


def _continue(policy: Policy, states: list[_State], count: int, rollout: RolloutConfig) -> list[list[Completion]]:
    """Continuations of each prefix."""
    requests = [
        Request(state.prompt, mix_seed(state.seed, number), state.tokens) for state in states for number in range(count)
    ]
    engine = TorchEngine(policy.model, policy.tokenizer, rollout.kv_tokens)
    with policy.whole_head():
        drawn = engine.run(requests, sampling_params(rollout, policy.end_ids))
    return [drawn[start : start + count] for start in range(0, len(drawn), count)]


def _judged(
    policy: Policy, states: list[_State], drawn: list[list[Completion]], scorer: Scorer
) -> list[list[tuple[str, float]]]:
    """Texts and rewards of the whole responses, for each prefix."""
    pairs = [(state, completion) for state, part in zip(states, drawn, strict=True) for completion in part]
    texts = [response_text(policy, [*state.tokens, *completion.tokens]) for state, completion in pairs]
    rewards = iter(scorer.rewards([state.problem for state, _ in pairs], texts))
    named = iter(texts)
    return [[(next(named), next(rewards)) for _ in part] for part in drawn]
