import random
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora
from lit_rl.modules import policy as policies
from lit_rl.modules.layout import Layout, Sequences
from lit_rl.modules.passes import Passes
from lit_rl.modules.policy import Policy
from lit_rl.modules.trie import Nodes, Tree, grow

CPU = torch.device("cpu")
HAND = {0: [5, 6, 7, 3], 1: [5, 6, 8, 9], 2: [4], 3: [5, 6, 7, 3], 4: [5, 6], 5: []}


def forest(seed: int, groups: int = 4, samples: int = 6, prompts: tuple[int, int] = (1, 5)) -> Sequences:
    """Groups of random responses of which most go on from an earlier one; some are empty, equal, or prefixes."""
    draw = random.Random(seed)
    texts = [[draw.randrange(10, 1000) for _ in range(draw.randint(*prompts))] for _ in range(groups)]
    responses: list[list[int]] = []
    owners = [group for _ in range(samples) for group in range(groups)]
    for number, group in enumerate(owners):
        earlier = [response for row, response in enumerate(responses) if owners[row] == group]
        taken = draw.choice(earlier)[: draw.randint(0, 9)] if earlier and draw.random() < 0.8 else []
        responses.append(taken + [draw.randrange(10, 14) for _ in range(draw.randint(0, 5 if number % 3 else 0))])
    return Sequences([texts[group] for group in owners], responses, owners)


def lists(tree: Tree) -> dict[str, list[int]]:
    return {name: getattr(tree, name).tolist() for name in ("input_ids", "positions", "ends", "states")}


def test_a_tree_worked_out_by_hand() -> None:
    """Of the nodes 4, 5, 5-6, 5-6-7, 5-6-7-3, 5-6-8 and 5-6-8-9 those that something follows are read."""
    tree = grow([1, 2], HAND, merge=True)
    assert tree.rows == [5, 2, 4, 0, 3, 1]
    assert lists(tree) == {
        "input_ids": [1, 2, 5, 6, 7, 8],
        "positions": [0, 1, 2, 3, 4, 4],
        "ends": [6, 6, 6, 6, 5, 6],  # 7 is not seen by 8
        "states": [1, *[1, 2], *[1, 2, 3, 4], *[1, 2, 3, 4], *[1, 2, 3, 5]],
    }
    assert tree.nodes.number.tolist() == [0, *[1, 2], *[1, 2, 3, 4], *[1, 2, 3, 4], *[1, 2, 5, 6]]
    assert tree.nodes.first.tolist() == [0, 1, 2, 5, 6, 13, 14]


def test_without_merging_each_response_is_a_branch() -> None:
    tree = grow([1, 2], {number: HAND[number] for number in (0, 4, 3, 5)}, merge=False)
    assert tree.rows == [0, 4, 3, 5]
    assert lists(tree) == {
        "input_ids": [1, 2, 5, 6, 7, 5, 5, 6, 7],
        "positions": [0, 1, 2, 3, 4, 2, 2, 3, 4],
        "ends": [9, 9, 5, 5, 5, 6, 9, 9, 9],
        "states": [*[1, 2, 3, 4], *[1, 5], *[1, 6, 7, 8]],
    }
    assert torch.equal(tree.nodes.number, torch.arange(10))


@pytest.mark.parametrize(
    ("responses", "ids", "ends", "nodes"),
    [
        ({3: [5, 6]}, [1, 5], [2, 2], 2),  # a single response
        ({3: [5, 6], 1: [5, 6]}, [1, 5], [2, 2], 2),  # the same twice
        ({3: [5, 6, 7], 1: [5]}, [1, 5, 6], [3, 3, 3], 3),  # the last of one, which the other needs
        ({3: [5, 6], 1: [7, 8]}, [1, 5, 7], [3, 2, 3], 4),  # nothing in common
        ({3: [5, 6, 7], 1: [8, 6, 7]}, [1, 5, 6, 8, 6], [5, 3, 3, 5, 5], 6),  # equal tokens after different ones
        ({3: []}, [1], [1], 0),
        ({3: [], 1: [5]}, [1], [1], 1),
    ],
)
def test_small_trees(responses: dict[int, list[int]], ids: list[int], ends: list[int], nodes: int) -> None:
    """Behind a prompt of one token."""
    tree = grow([1], responses, merge=True)
    assert (tree.input_ids.tolist(), tree.ends.tolist(), len(tree.nodes.first)) == (ids, ends, nodes)


def test_tokens_read_of_a_forest_counted_by_hand() -> None:
    """Rows of 5, 5, 2, 5, 3 and 2 tokens, and two of 4; shared 12 and 6, as tries 6 and 5."""
    responses = [*HAND.values(), [5, 6], [7, 8]]
    sequences = Sequences([[1, 2]] * 6 + [[1, 2, 3]] * 2, responses, [0] * 6 + [1] * 2)
    read: dict[Layout, int] = {}
    for layout in ("sorted", "shared", "trie"):
        read[layout] = sum(chunk.tokens for chunk in sequences.chunks(range(8), 1, CPU, layout))
    assert read == {"sorted": 22 + 8, "shared": 12 + 5, "trie": 6 + 5}
    first, second = sequences.chunks(range(8), 1, CPU, "trie")
    assert first.nodes is not None
    assert len(first.nodes.first) == 7
    assert second.nodes is None
    (both,) = sequences.chunks(range(8), 100, CPU, "trie")
    assert both.tokens == 2 * 6
    assert both.nodes is not None
    assert both.nodes.number.tolist() == [*first.nodes.number.tolist(), 7, 8, 9, 10]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_a_state_sees_the_prompt_and_the_tokens_before_it(seed: int, budget: int) -> None:
    sequences = forest(seed)
    nodes = 0
    seen: list[int] = []
    for chunk in sequences.chunks(range(24), budget, CPU, "trie"):
        assert chunk.mask is not None
        mask = chunk.mask.squeeze(1)
        states = iter(chunk.states.tolist())
        paths = []
        for row in chunk.rows:
            prompt, response = list(sequences.prompts[row]), list(sequences.responses[row])
            for step, token in enumerate(response):
                place, at = divmod(next(states), chunk.input_ids.shape[1])
                visible = mask[place, at]
                assert chunk.input_ids[place][visible].tolist() == prompt + response[:step]
                assert chunk.positions[place][visible].tolist() == list(range(len(prompt) + step))
                paths.append((sequences.groups[row], *response[:step], token))
        distinct = set(paths)
        given = chunk.nodes or Nodes(torch.arange(len(paths)), torch.arange(len(paths)))
        assert len(given.first) == len(distinct)
        assert [paths[given.first[number]] for number in given.number.tolist()] == paths
        assert bool(mask.any(-1).all())  # padding too, or its attention would be 0 / 0
        nodes, seen = nodes + len(distinct), seen + chunk.rows
    assert sorted(seen) == list(range(24))
    assert nodes < sum(map(len, sequences.responses)) - 10


def test_the_head_does_a_node_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And the pass over all rows gives what each row has by itself, under both sets of weights."""
    policy = Policy("nano-qwen3", BackboneConfig(seed=1), Lora(), temperature=0.7, reference=True)
    policy.model.requires_grad_(True)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    sequences = forest(2)
    lengths = torch.tensor([len(response) for response in sequences.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    responses = torch.zeros(mask.shape, dtype=torch.long)
    responses[mask] = torch.tensor([token for response in sequences.responses for token in response])
    done, compute = dict.fromkeys(("sorted", "trie"), 0), policies.token_log_probs
    found = {}
    for layout in ("sorted", "trie"):

        def counted(states: Tensor, *rest: Any, layout: str = layout) -> Any:
            done[layout] += len(states)
            return compute(states, *rest)

        monkeypatch.setattr(policies, "token_log_probs", counted)
        passes = Passes(policy, 50, layout, equal=False)  # type: ignore[arg-type]
        pair = (passes.log_probs, passes.reference_log_probs)
        found[layout] = torch.stack([call(sequences, responses, mask) for call in pair])
    torch.testing.assert_close(found["trie"], found["sorted"], atol=2e-6, rtol=0)
    assert float((found["trie"][0] - found["trie"][1]).abs().max()) > 0.01
    distinct = {
        (group, *response[: step + 1])
        for group, response in zip(sequences.groups, sequences.responses, strict=True)
        for step in range(len(response))
    }
    assert done == {"sorted": 2 * int(mask.sum()), "trie": 2 * len(distinct)}
