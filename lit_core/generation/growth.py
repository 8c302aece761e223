"""Trees of responses: branches that go on from a position of an earlier response, with its keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from lit_core.generation.requests import FinishReason, Request, StepHook
from lit_core.generation.run import Cache, Group, Run, check_finite
from lit_core.generation.sampling import SamplingParams
from lit_core.generation.shared_cache import SharedCache, Stored
from lit_core.generation.stopping import StopStrings

DROP_SHARE = 1 / 16  # of the rows have to be finished before they make room for their trees' next rounds


@dataclass(frozen=True)
class Branch:
    """A response to be drawn.

    Args:
        seed: Seed of its draws.
        parent: Number of the response, to the same prompt, whose first tokens it begins with; None begins afresh.
        position: How many of them.
        max_tokens: Most tokens, those included; None takes the engine's limit.
    """

    seed: int
    parent: int | None = None
    position: int = 0
    max_tokens: int | None = None


@dataclass
class Response:
    """A response of a tree, what it has from its parent included.

    Args:
        parent: Number of the response that it left; None where it began at the prompt.
        position: At which token it left.
        tokens: Ids, the end token included.
        log_probs: Log-probability of each under the sampling temperature, float32 ``(T,)``, on the host.
        finish_reason: As of a ``Completion``.
        scalars: What the step hook has computed at each token, float32 ``(T,)`` each.
    """

    parent: int | None
    position: int
    tokens: list[int]
    log_probs: Tensor
    finish_reason: FinishReason
    scalars: dict[str, Tensor]


class Planner(Protocol):
    """Decides how trees grow; deterministic, as trees finish their rounds in any order.

    ``responses`` is the most that a tree has, ``width`` the most of them that a round draws.
    """

    responses: int
    width: int

    def __call__(self, prompt: int, responses: Sequence[Response]) -> Sequence[Branch]:
        """Next round of a prompt's tree, given all of its responses so far; an empty one ends it."""
        ...


class Growth(Run):
    """The rows of one call that grows trees.

    Args:
        cache: Where they decode.
        planner: Says what is drawn next.
        prompts: Token ids of each prompt.
        params: How tokens are drawn.
        stops: Stop strings.
        hook: Step hook.
        device: Of the model.
        reuse: Whether branches begin from stored keys and values; the cache is a ``SharedCache`` then.
    """

    def __init__(
        self,
        cache: Cache,
        planner: Planner,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        stops: StopStrings | None,
        hook: StepHook | None,
        device: torch.device,
        reuse: bool,
    ) -> None:
        super().__init__(cache, [], params, stops, hook, device)
        self.planner, self.prompts = planner, prompts
        self.shared = cache if reuse and isinstance(cache, SharedCache) else None
        self.trees: list[list[Response]] = [[] for _ in prompts]
        self.numbers: list[list[int]] = [[] for _ in prompts]  # of each tree's requests
        self.asked: list[tuple[int, Branch]] = []  # prompt and branch of each request
        self.responses: dict[int, Response] = {}  # of finished requests
        self.stored: dict[int, Stored] = {}  # their keys and values, while the tree grows

    def begin(self) -> list[Group]:
        """The first round of each tree."""
        rounds = [self._plan(prompt) for prompt in range(len(self.prompts))]
        if not all(rounds):
            raise ValueError("a tree needs at least one response, the planner asks for none")
        return [self._group(numbers) for numbers in rounds]

    def _plan(self, prompt: int) -> list[int]:
        """Ask for a tree's next round; returns the numbers of its requests."""
        with torch.inference_mode(False):  # what the planner computes is its own
            branches = self.planner(prompt, self.trees[prompt])
        mine = self.numbers[prompt]
        _check_round(branches, self.trees[prompt], self.planner, self.params.max_tokens)
        found = []
        for branch in branches:
            number = len(self.requests)
            prefix = [] if branch.parent is None else self.trees[prompt][branch.parent].tokens[: branch.position]
            self.requests.append(Request(self.prompts[prompt], branch.seed, prefix))
            self.limits.append(branch.max_tokens or self.params.max_tokens)
            self.asked.append((prompt, branch))
            found.append(number)
        self._reserve()
        for number, branch in zip(found, branches, strict=True):
            if branch.parent is not None:
                for kept in (self.tokens, self.log_probs, *self.scalars.values()):
                    kept[number, : branch.position] = kept[mine[branch.parent], : branch.position]
        mine += found
        return found

    def _reserve(self) -> None:
        """Make room for what further requests draw."""
        missing = len(self.requests) - len(self.tokens)
        if missing > 0:
            missing = max(missing, len(self.tokens))  # twice as much each time

            def longer(tensor: Tensor) -> Tensor:
                return torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])])

            self.tokens, self.log_probs = longer(self.tokens), longer(self.log_probs)
            self.scalars = {name: longer(values) for name, values in self.scalars.items()}

    def _group(self, numbers: list[int]) -> Group:
        """Requests with the same prompt and prefix, to be read together."""
        request = self.requests[numbers[0]]
        drawn = len(request.prefix)
        return Group([*request.prompt, *request.prefix], numbers, drawn, self.params.max_tokens - drawn)

    def _read(self, groups: list[Group]) -> Tensor:
        if self.shared is None:
            return super()._read(groups)
        names = [self.asked[group.members[0]][0] for group in groups]
        return self.shared.admit([g.tokens for g in groups], [len(g.members) for g in groups], names)

    def _is_worth_dropping(self, count: int) -> bool:
        return count >= DROP_SHARE * len(self.rows)

    def _leave(self, done: Sequence[int]) -> None:
        """Drop rows, and begin the next round of each tree that has no other row."""
        numbers = [self.rows[row] for row in done]
        self._finish(numbers)
        started, ended = list[int](), set[int]()
        for prompt in dict.fromkeys(self.asked[number][0] for number in numbers):
            if all(number in self.responses for number in self.numbers[prompt]):
                self.trees[prompt] = [self.responses[number] for number in self.numbers[prompt]]
                following = self._plan(prompt)
                started += following
                if not following:
                    self._close(prompt)
                    ended.add(prompt)
        if self.shared is not None:
            going_on = [row for row in done if self.asked[self.rows[row]][0] not in ended]
            self.stored.update(zip([self.rows[row] for row in going_on], self.shared.store(going_on), strict=True))
        super()._leave(done)
        if self.shared is None:
            self.waiting += [self._group(numbers) for numbers in self._alike(started)]
        elif started:
            self._start(self.shared, started)
            if max(self.drawn) >= self.params.max_tokens:  # a first token that was the only one
                self._drop_finished()

    def _finish(self, numbers: Sequence[int]) -> None:
        """Keep what requests have drawn."""
        index = torch.tensor(numbers, device=self.device)
        log_probs, tokens = self.log_probs[index].cpu(), self.tokens[index].cpu().tolist()
        scalars = {name: values[index].cpu() for name, values in self.scalars.items()}
        with torch.inference_mode(False):  # gradients may flow through copies
            for place, number in enumerate(numbers):
                branch, (length, reason) = self.asked[number][1], self.finished[number]
                found = log_probs[place, :length].clone()
                check_finite(found)
                kept = {name: values[place, :length].clone() for name, values in scalars.items()}
                self.responses[number] = Response(
                    branch.parent, branch.position, tokens[place][:length], found, reason, kept
                )

    def _close(self, prompt: int) -> None:
        for number in self.numbers[prompt]:
            self.stored.pop(number, None)
        if self.shared is not None:
            self.shared.close(prompt)

    def _alike(self, numbers: Sequence[int]) -> list[list[int]]:
        """Requests by the prefix that they have."""
        found: dict[tuple[int, int | None, int], list[int]] = {}
        for number in numbers:
            prompt, branch = self.asked[number]
            found.setdefault((prompt, branch.parent, branch.position), []).append(number)
        return list(found.values())

    def _start(self, cache: SharedCache, numbers: Sequence[int]) -> None:
        """Begin rows behind what is stored; the last token of a prefix is read again, which gives the next one."""
        behind = [number for number in numbers if self.asked[number][1].position > 0]
        fresh = [number for number in numbers if self.asked[number][1].position == 0]
        if behind:
            branches = [self.asked[number] for number in behind]
            parents = [self.numbers[prompt][branch.parent or 0] for prompt, branch in branches]
            positions = [branch.position for _, branch in branches]
            names = [prompt for prompt, _ in branches]
            cache.branch(names, [self.stored[parent] for parent in parents], [length - 1 for length in positions])
            self._enter(behind, positions)
        if fresh:
            first = len(self.rows)
            logits = cache.restart([self.asked[number][0] for number in fresh])
            self._enter(fresh, [0] * len(fresh))
            self._draw(logits, first)


def _check_round(branches: Sequence[Branch], tree: Sequence[Response], planner: Planner, max_tokens: int) -> None:
    if len(branches) > planner.width or len(tree) + len(branches) > planner.responses:
        raise ValueError(
            f"a planner of {planner.responses} responses, {planner.width} a round, has {len(tree)} and asks for "
            f"{len(branches)}"
        )
    for branch in branches:
        limit = branch.max_tokens or max_tokens
        if not 0 <= branch.position < limit <= max_tokens:
            raise ValueError(f"a branch at token {branch.position} of at most {limit} tokens does not fit {max_tokens}")
        if branch.parent is None and branch.position == 0:
            continue
        if branch.parent is None or not 0 <= branch.parent < len(tree):
            raise ValueError(f"a branch needs one of {len(tree)} responses as its parent, got {branch.parent}")
        parent = tree[branch.parent]
        last = len(parent.tokens) - (parent.finish_reason == "stop")  # nothing follows an end token
        if branch.position > last:
            raise ValueError(f"a branch leaves its parent at token {last} at most, got {branch.position}")
