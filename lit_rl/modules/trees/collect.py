"""From problems to scored responses that share prefixes."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lit_core.generation import Planner, Response, TorchEngine
from lit_core.generation.requests import StepHook
from lit_rl.modules.config import RolloutConfig
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import Rollout, sampling_params, scored
from lit_rl.modules.scoring import Scorer
from lit_rl.modules.trees.branching import Branching, Rounds, lineage
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.modules.trees.scores import ScoreHook
from lit_rl.modules.trees.segments import SegmentTree, leaf_lineage
from lit_rl.problems import ProblemBatch


def planner_of(config: TreeConfig, rollout: RolloutConfig, seed: int, ids: Sequence[int]) -> Planner:
    """What a sampler asks the engine for.

    Args:
        config: Of the trees.
        rollout: Samples and their most tokens.
        seed: Of this rollout.
        ids: Of each prompt's problem.
    """
    if config.sampler in ("tree_rl", "tree_grpo"):
        return Rounds(config, seed, ids)
    if config.sampler in ("tree_po", "spo_tree"):
        return SegmentTree(config, rollout.samples, rollout.max_tokens, seed, ids)
    return Branching(config, rollout.samples, seed, ids)


def grow(
    policy: Policy,
    batch: ProblemBatch,
    config: TreeConfig,
    rollout: RolloutConfig,
    seed: int,
    hook: StepHook | None,
    reuse: bool | None = None,
) -> list[list[Response]]:
    """Draw a tree of responses to each problem; it depends on the seed and the problem's id alone.

    Args:
        policy: Draws them.
        batch: Problems.
        config: Of the trees.
        rollout: How tokens are drawn.
        seed: Of this rollout.
        hook: Scores of positions.
        reuse: Begin branches from stored keys and values; see ``TorchEngine.grow``.
    """
    planner = planner_of(config, rollout, seed, [problem.id for problem in batch.problems])
    engine = TorchEngine(policy.model, policy.tokenizer, rollout.kv_tokens)
    with policy.whole_head():
        return engine.grow(batch.prompts, planner, sampling_params(rollout, policy.end_ids), hook, reuse)


def collect_trees(
    policy: Policy,
    batch: ProblemBatch,
    config: TreeConfig,
    rollout: RolloutConfig,
    seed: int,
    scorer: Scorer,
    device: torch.device,
    table: Tensor | None = None,
    first_group: int = 0,
) -> tuple[Rollout, list[list[Response]]]:
    """Draw trees for training and score their responses; also returns the trees.

    Args:
        policy: Draws them.
        batch: Problems, one group of responses each.
        config: Of the trees.
        rollout: How tokens are drawn.
        seed: Of this rollout.
        scorer: Gives the rewards.
        device: Where the tensors go.
        table: Unit embeddings; with them positions are scored.
        first_group: Number of the first group.
    """
    hook = None if table is None else ScoreHook(table, config)
    trees = grow(policy, batch, config, rollout, seed, hook)
    drawn = sum(len(response.tokens) - response.position for tree in trees for response in tree)
    responses, counts, parents, branches = list[Response](), list[int](), list[Tensor](), list[Tensor]()
    for tree in trees:
        if config.sampler in ("tree_po", "spo_tree"):
            numbers, above, where = leaf_lineage(tree)
        else:
            numbers, (above, where) = list(range(len(tree))), lineage(tree)
        first = len(responses)
        responses += [tree[number] for number in numbers]
        counts.append(len(numbers))
        parents.append(torch.where(above < 0, -1, above + first))
        branches.append(where)

    owners = [number for number, count in enumerate(counts) for _ in range(count)]
    problems, prompts = [batch.problems[number] for number in owners], [batch.prompts[number] for number in owners]
    groups = [first_group + number for number in owners]
    found = scored(policy, problems, prompts, groups, responses, rollout, scorer, device)
    found.new_tokens = drawn
    found.parents, found.branches = torch.cat(parents).to(device), torch.cat(branches).to(device)
    return found, trees
