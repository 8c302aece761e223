"""Part 1: where each score makes trees branch, on a frozen policy."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from lit_core.files import write_json
from lit_core.generation import Response
from lit_core.samplers import mix_seed
from lit_rl.functional.branching import mean_cosine
from lit_rl.functional.tree_advantages import rose
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.trees.collect import collect_trees
from lit_rl.modules.trees.scores import unit_embeddings
from lit_rl.modules.trees.statistics import branch_places, entropy_percentiles
from lit_rl.problems import Problem, ProblemBatch
from lit_rl.rewards.countdown_steps import token_roles
from lit_rl.rewards.tasks import TASKS

PROBLEMS_AT_ONCE = 128
STATE_TOKENS = 4096  # of one pass for the states of responses
SHOWN = 3  # trees that are kept to be drawn
Items = dict[str, dict[str, float]]


def look(module: Any, problems: Sequence[Problem], seed: int, folder: Path) -> tuple[dict[str, float], Items]:
    """Draw a tree to each problem and say where it branches.

    Args:
        module: A ``ROSE`` with its policy.
        problems: Of the task ``countdown_steps``.
        seed: Of the draws, the same for every score.
        folder: ``trees.json`` goes there, and ``places.json`` with the counts of branches by role and by position.

    Returns:
        Metrics, and those of each problem by its id.
    """
    policy: Policy = module.policy
    collate = module.prompt_collator()
    table = unit_embeddings(policy.model)
    items: Items = {}
    counts: dict[str, int] = {}
    where: list[float] = []
    drawn: list[dict[str, Any]] = []
    for start in range(0, len(problems), PROBLEMS_AT_ONCE):
        batch: ProblemBatch = collate(list(problems[start : start + PROBLEMS_AT_ONCE]))
        rollout, trees = collect_trees(
            policy, batch, module.tree, module.rollout, mix_seed(seed, start), module.scorer, module.device, table
        )
        cosines = _state_cosines(policy, rollout)
        for number, (problem, tree) in enumerate(zip(batch.problems, trees, strict=True)):
            roles = [_roles(policy, response, problem) for response in tree]
            places = branch_places(tree)
            found = [roles[parent][position] for parent, position in places]
            for role in found:
                counts[role] = counts.get(role, 0) + 1
            where += [position / len(tree[parent].tokens) for parent, position in places]
            rows = range(number * len(tree), (number + 1) * len(tree))
            mine = _measures(problem, rollout, rows, found, entropy_percentiles(tree), places)
            mine["state_cosine"] = cosines[number]
            for name, value in mine.items():
                items.setdefault(name, {})[str(problem.id)] = value
        if not drawn:
            drawn = [_drawn(policy, rollout, trees, number) for number in range(min(SHOWN, len(trees)))]
    write_json(folder / "trees.json", drawn)
    write_json(folder / "places.json", {"roles": counts, "relative_positions": where})
    metrics = {name: fmean(values.values()) for name, values in items.items()}
    return {**metrics, "table_cosine": float(mean_cosine(table))}, items


def _roles(policy: Policy, response: Response, problem: Problem) -> list[str]:
    pieces = [policy.tokenizer.decode([token], skip_special_tokens=False) for token in response.tokens]
    if response.finish_reason == "stop":
        pieces = pieces[:-1]
    return [*token_roles(pieces, problem.row["numbers"]), "end"][: len(response.tokens)]


def _measures(
    problem: Problem,
    rollout: Rollout,
    rows: range,
    roles: Sequence[str],
    percentiles: Sequence[float],
    places: Sequence[tuple[int, int]],
) -> dict[str, float]:
    rewards = [rollout.rewards[row] for row in rows]
    answers = {TASKS[problem.task].answer(problem.row, rollout.texts[row]) for row in rows} - {None}
    found = {
        "distinct_answers": float(len(answers)),
        "mixed": float(len(set(rewards)) > 1),
        "reward": fmean(rewards),
    }
    if places:
        found["decisions"] = sum(role == "decision" for role in roles) / len(roles)
        found["connectors"] = sum(role == "connector" for role in roles) / len(roles)
        found["distinct_places"] = len(set(places)) / len(places)
        if percentiles:
            found["entropy_percentile"] = fmean(percentiles)
    return found


@torch.no_grad()
def _state_cosines(policy: Policy, rollout: Rollout) -> list[float]:
    """Mean cosine of the mean states of each group's responses; smaller is more diverse."""
    means = torch.zeros(len(rollout), 1)
    for chunk in rollout.sequences.chunks(range(len(rollout)), STATE_TOKENS, rollout.mask.device, "sorted"):
        states = policy.states(chunk)
        lengths = [len(rollout.sequences.responses[row]) for row in chunk.rows]
        if means.shape[1] == 1:
            means = torch.zeros(len(rollout), states.shape[1])
        means[torch.tensor(chunk.rows)] = torch.stack([part.mean(0) for part in states.split(lengths)]).cpu()
    groups: Tensor = means.view(len(set(rollout.sequences.groups)), -1, means.shape[1])
    return mean_cosine(groups).tolist()


def _drawn(policy: Policy, rollout: Rollout, trees: Sequence[Sequence[Response]], number: int) -> dict[str, Any]:
    """A tree as the figure needs it."""
    size = len(trees[number])
    rows = list(range(number * size, (number + 1) * size))
    part = rollout.take(rows)
    advantages = rose(part.forest, part.scores, part.mask)
    responses = [
        {
            "pieces": [policy.tokenizer.decode([token], skip_special_tokens=False) for token in response.tokens],
            "parent": int(part.forest.parents[place]),
            "branch": int(part.forest.branches[place]),
            "reward": part.rewards[place],
            "advantages": advantages[place, : len(response.tokens)].tolist(),
        }
        for place, response in enumerate(trees[number])
    ]
    return {"prompt": part.problems[0].prompt, "responses": responses}
