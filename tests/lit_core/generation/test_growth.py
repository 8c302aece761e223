"""Trees of responses: reused keys and values, rounds that do not wait for each other, limits."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from engine_models import NAMES, log_probs_of, model_of, prompts_of, teacher_forced, token_by_token

from lit_core.errors import InputError
from lit_core.generation import Branch, Request, Response, SamplingParams, TorchEngine
from lit_core.generation.growth import Planner
from lit_core.samplers import mix_seed

PARAMS = SamplingParams(max_tokens=12, stop_ids=(3, 5, 7))


@dataclass
class Wild:
    """Rounds of one to three branches at any place of earlier responses, also at the prompt."""

    responses: int = 9
    width: int = 3
    seed: int = 0
    asked: dict[tuple[int, int], Branch] = field(default_factory=dict)

    def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
        have = len(responses)
        generator = random.Random(mix_seed(self.seed, prompt, have))
        count = min(generator.randint(1, self.width), self.responses - have)
        found = []
        for number in range(have, have + count):
            seed = mix_seed(self.seed, prompt, number)
            if not responses or generator.random() < 0.25:
                found.append(Branch(seed))
                continue
            parent = generator.randrange(have)
            last = len(responses[parent].tokens) - 1
            found.append(Branch(seed, parent, generator.randint(0, last)))
        self.asked |= {(prompt, have + number): branch for number, branch in enumerate(found)}
        return found


def grown(model: Any, prompts: Any, params: SamplingParams = PARAMS, reuse: bool = True, **kwargs: Any) -> Any:
    tokenizer = kwargs.pop("tokenizer", None)
    planner = kwargs.pop("planner", None) or Wild()
    engine = TorchEngine(model, tokenizer, **kwargs)
    return engine.grow(prompts, planner, params, reuse=reuse)


def outline(trees: Sequence[Sequence[Response]]) -> list[list[tuple[Any, ...]]]:
    return [[(r.parent, r.position, r.tokens, r.finish_reason) for r in tree] for tree in trees]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [0, 1])
def test_branches_from_stored_keys_are_those_from_prefixes_read_again(name: str, temperature: float) -> None:
    model, prompts = model_of(name), prompts_of(10)
    params = SamplingParams(max_tokens=12, stop_ids=(3, 5, 7), temperature=temperature)
    reused, again = (grown(model, prompts, params, reuse) for reuse in (True, False))
    assert outline(reused) == outline(again)
    assert sum(len(tree) for tree in reused) == 90
    for one, two in zip(reused, again, strict=True):
        for left, right in zip(one, two, strict=True):
            torch.testing.assert_close(left.log_probs, right.log_probs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["tiny-qwen3", "gpt2"])
def test_branches_are_those_of_sampling_without_a_cache(name: str) -> None:
    model, prompts, planner = model_of(name), prompts_of(4), Wild()
    trees = grown(model, prompts, planner=planner)
    for number, (prompt, tree) in enumerate(zip(prompts, trees, strict=True)):
        for place, response in enumerate(tree):
            branch = planner.asked[number, place]
            assert (response.parent, response.position) == (branch.parent, branch.position)
            prefix = [] if branch.parent is None else tree[branch.parent].tokens[: branch.position]
            expected, reason = token_by_token(model, Request(prompt, branch.seed, prefix), PARAMS)
            assert response.tokens == [*prefix, *expected]
            assert response.finish_reason == reason
            found = log_probs_of(teacher_forced(model, prompt, response.tokens), response.tokens)
            torch.testing.assert_close(response.log_probs, found, atol=1e-4, rtol=0)


def test_a_tree_is_the_same_in_any_company_and_at_any_budget() -> None:
    model, prompts = model_of("tiny-qwen3"), prompts_of(12)
    whole = outline(grown(model, prompts))
    tight = outline(grown(model, prompts, kv_tokens=20 + (3 + 9) * 12))
    assert tight == whole

    class First(Wild):
        def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
            return super().__call__(prompt + 5, responses)

    assert outline(grown(model, prompts[5:6], planner=First())) == whole[5:6]


def test_scalars_of_a_prefix_come_from_the_parent() -> None:
    model, prompts = model_of("tiny-qwen3"), prompts_of(5)

    def entropy(logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        logs = logits.log_softmax(-1)
        return {"entropy": -(logs.exp() * logs).sum(-1)}

    trees = TorchEngine(model).grow(prompts, Wild(), PARAMS, entropy)
    for prompt, tree in zip(prompts, trees, strict=True):
        for response in tree:
            logs = teacher_forced(model, prompt, response.tokens).log_softmax(-1)
            torch.testing.assert_close(response.scalars["entropy"], -(logs.exp() * logs).sum(-1), atol=1e-4, rtol=0)
            if response.parent is not None:
                kept = tree[response.parent].scalars["entropy"][: response.position]
                assert torch.equal(response.scalars["entropy"][: response.position], kept)
            assert not response.log_probs.is_inference()


class Segments:
    """Segments of three tokens, each continued once where it has not ended."""

    responses, width = 4, 1

    def __call__(self, prompt: int, responses: Sequence[Response]) -> list[Branch]:
        if not responses:
            return [Branch(1, max_tokens=3)]
        if responses[-1].finish_reason == "stop" or len(responses) == 4:
            return []
        return [Branch(1, len(responses) - 1, len(responses[-1].tokens), 3 * len(responses) + 3)]


@pytest.mark.parametrize("reuse", [True, False])
def test_segments_continue_at_their_ends(reuse: bool) -> None:
    """The draws of a request depend on its seed and the place of the token alone: segments add up to one response."""
    model, prompts = model_of("tiny-qwen3"), prompts_of(8)
    trees = grown(model, prompts, planner=Segments(), reuse=reuse)
    for prompt, tree in zip(prompts, trees, strict=True):
        assert [len(response.tokens) for response in tree[:-1]] == [3 * number + 3 for number in range(len(tree) - 1)]
        assert tree[-1].tokens == token_by_token(model, Request(prompt, 1), PARAMS)[0]


class Asks:
    """Two roots, then what a test asks for."""

    def __init__(self, branches: Sequence[Branch], responses: int = 4, width: int = 2) -> None:
        self.branches, self.responses, self.width = branches, responses, width

    def __call__(self, prompt: int, responses: Sequence[Response]) -> Sequence[Branch]:
        return self.branches if responses else [Branch(0), Branch(1)]


@pytest.mark.parametrize(
    ("branches", "message"),
    [
        ([Branch(1, 2, 1)], "needs one of 2 responses as its parent, got 2"),
        ([Branch(1, None, 1)], "needs one of 2 responses as its parent, got None"),
        ([Branch(1, 0, 12)], "at token 12 of at most 12"),
        ([Branch(1, 0, -1)], "at token -1"),
        ([Branch(1, 0, 2, 2)], "at token 2 of at most 2"),
        ([Branch(1, 0, 0, 13)], "at token 0 of at most 13 tokens does not fit 12"),
        ([Branch(1)] * 3, "2 a round, has 2 and asks for 3"),
        ([Branch(1, 0, 11)], "leaves its parent at token"),
    ],
)
def test_a_planner_is_told_what_cannot_be(branches: Sequence[Branch], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grown(model_of("tiny-qwen3"), prompts_of(3), planner=Asks(branches))


def test_a_tree_larger_than_the_cache_is_refused() -> None:
    prompts = [[1, 2, 3]]
    planner: Planner = Asks([])
    with pytest.raises(InputError, match=r"a tree of 4 responses of 12 tokens need 75"):
        grown(model_of("tiny-qwen3"), prompts, planner=planner, kv_tokens=74)
    assert len(grown(model_of("tiny-qwen3"), prompts, planner=planner, kv_tokens=75)[0]) == 2
    assert grown(model_of("tiny-qwen3"), []) == []
