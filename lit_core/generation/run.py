"""One call of the engine: rows that decode together, enter and leave."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.generation.requests import Completion, FinishReason, Request, StepHook
from lit_core.generation.sampling import SamplingParams, choose, keys
from lit_core.generation.stopping import StopStrings

DROP_SHARE = 1 / 8  # of the rows have to be finished before they are dropped
GPU_STEPS = 8  # between two looks at what has finished: each look waits for the device


class Cache(Protocol):
    """Rows that decode together; see :class:`SharedCache`."""

    joins_running: bool

    def __len__(self) -> int: ...
    def has_room(self, rows: int, prompts: int) -> bool: ...
    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor: ...
    def step(self, tokens: Tensor) -> Tensor: ...
    def keep(self, rows: Sequence[int]) -> list[int]: ...


@dataclass
class Group:
    """Requests with the same prompt and prefix: its tokens, their numbers, and tokens drawn and still to be drawn."""

    tokens: list[int]
    members: list[int]
    drawn: int
    remaining: int

    def split(self, count: int) -> "Group":
        """Take the first members out."""
        first, self.members = self.members[:count], self.members[count:]
        return replace(self, members=first)


def grouped(requests: Sequence[Request], max_tokens: int, vocabulary: int) -> list[Group]:
    """Put requests with the same prompt and prefix together.

    Raises:
        InputError: A token that the model does not have, or a prefix that leaves nothing to draw.
    """
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for number, request in enumerate(requests):
        found.setdefault((tuple(request.prompt), tuple(request.prefix)), []).append(number)
    groups = []
    for (prompt, prefix), members in found.items():
        remaining = max_tokens - len(prefix)
        if remaining < 1:
            raise InputError(f"a prefix of {len(prefix)} tokens leaves nothing of {max_tokens} to draw")
        for token in (min(prompt + prefix), max(prompt + prefix)):  # a GPU would not survive the lookup
            if not 0 <= token < vocabulary:
                raise InputError(f"the model has tokens 0 to {vocabulary - 1}, got {token} in a prompt or prefix")
        groups.append(Group([*prompt, *prefix], members, len(prefix), remaining))
    return groups


class Run:
    """The rows of one call and what they have drawn so far."""

    def __init__(
        self,
        cache: Cache,
        requests: Sequence[Request],
        params: SamplingParams,
        stops: StopStrings | None,
        hook: StepHook | None,
        device: torch.device,
    ) -> None:
        self.cache, self.requests, self.params, self.stops, self.hook = cache, list(requests), params, stops, hook
        self.device, self.look_every = device, GPU_STEPS if device.type == "cuda" else 1
        self.waiting: list[Group] = []
        shape = len(requests), params.max_tokens
        self.limits = [params.max_tokens] * len(requests)  # of each response
        self.tokens = torch.zeros(shape, dtype=torch.long, device=device)
        self.log_probs = torch.zeros(shape, device=device)
        self.scalars: dict[str, Tensor] = {}
        self.ends: Tensor | None = None  # whether a token of the vocabulary is one that ends a response
        self.finished: dict[int, tuple[int, FinishReason]] = {}  # request: tokens of its response, and why it ended
        self.rows: list[int] = []  # request of each row
        self.drawn: list[int] = []  # tokens of each row's response, prefix included
        self.request, self.step, self.seeds, self.stopped = (
            torch.zeros(0, dtype=torch.long, device=device) for _ in range(4)
        )

    def complete(self, groups: list[Group]) -> None:
        """Run until every request is done."""
        self.waiting = list(reversed(groups))  # taken from the end
        steps = 0
        while self.waiting or self.rows:
            entering = self._entering() if self.cache.joins_running or not self.rows else []
            if entering:
                self._admit(entering)
            else:
                self._draw(self.cache.step(self.tokens[self.request, self.step - 1]), 0)
            steps += 1
            if steps % self.look_every == 0 or max(self.drawn) >= self.params.max_tokens:
                self._drop_finished()

    def _entering(self) -> list[Group]:
        """Take as many groups as there is room for; where the cache is empty, a part of one if need be."""
        waiting, entering = self.waiting, list[Group]()
        rows = 0
        while waiting and self.cache.has_room(rows + len(waiting[-1].members), len(entering) + 1):
            entering.append(waiting.pop())
            rows += len(entering[-1].members)
        if not entering and not self.rows:
            fitting = max(n for n in range(1, len(waiting[-1].members)) if self.cache.has_room(n, 1))
            entering = [waiting[-1].split(fitting)]
        return entering

    def _admit(self, groups: list[Group]) -> None:
        """Read the prompts of groups, and draw the first token of each of their rows."""
        first = len(self.rows)
        logits = self._read(groups)
        members = [(number, group.drawn) for group in groups for number in group.members]
        self._enter(*zip(*members, strict=True))
        self._draw(logits, first)

    def _read(self, groups: list[Group]) -> Tensor:
        return self.cache.admit([group.tokens for group in groups], [len(group.members) for group in groups])

    def _enter(self, numbers: Sequence[int], drawn: Sequence[int]) -> None:
        """Begin rows of requests that have so many tokens already."""

        def lengthened(tensor: Tensor, values: Iterable[int]) -> Tensor:
            return torch.cat([tensor, torch.tensor(list(values), dtype=torch.long, device=self.device)])

        self.rows += numbers
        self.drawn += drawn
        self.request = lengthened(self.request, numbers)
        self.step = lengthened(self.step, drawn)
        self.seeds = lengthened(self.seeds, [self.requests[number].seed for number in numbers])
        self.stopped = lengthened(self.stopped, [-1] * len(numbers))

    def _draw(self, logits: Tensor, first: int) -> None:
        """Choose a token for each row from ``first`` on."""
        request, step, stopped = self.request[first:], self.step[first:], self.stopped[first:]
        choice = choose(logits, keys(self.seeds[first:], step), self.params)
        self.tokens[request, step], self.log_probs[request, step] = choice
        if self.hook is not None:
            for name, values in self.hook(logits, choice.tokens).items():
                if name not in self.scalars:
                    self.scalars[name] = torch.zeros_like(self.log_probs)
                self.scalars[name][request, step] = values.float()
        if self.ends is None:
            self.ends = torch.zeros(logits.shape[1], dtype=torch.bool, device=self.device)
            self.ends[[token for token in self.params.stop_ids if 0 <= token < len(self.ends)]] = True
        ended = self.ends[choice.tokens]
        if self.stops is not None:
            for row in self.stops.candidates(choice.tokens):
                number = self.rows[first + row]
                prompt, prefix = self.requests[number].prompt, self.requests[number].prefix
                drawn = self.tokens[number, len(prefix) : self.drawn[first + row] + 1].tolist()
                ended[row] |= self.stops.completed([*prompt, *prefix, *drawn], len(prompt))
        stopped.copy_(torch.where(ended & (stopped < 0), step, stopped))
        step += 1
        self.drawn[first:] = [drawn + 1 for drawn in self.drawn[first:]]

    def _drop_finished(self) -> None:
        """Let finished rows leave, once it is worth it."""
        stopped = self.stopped.tolist()
        limits = [self.limits[number] for number in self.rows]
        done = [row for row, drawn in enumerate(self.drawn) if stopped[row] >= 0 or drawn >= limits[row]]
        if not done or not (max(self.drawn) >= self.params.max_tokens or self._is_worth_dropping(len(done))):
            return
        for row in done:
            ended = 0 <= stopped[row] < limits[row]
            self.finished[self.rows[row]] = (stopped[row] + 1, "stop") if ended else (limits[row], "length")
        self._leave(done)

    def _is_worth_dropping(self, count: int) -> bool:
        """A few finished rows stay until more are, or until the next group that waits fits instead of them."""
        replaced = False
        if self.waiting and self.cache.joins_running:
            replaced = self.cache.has_room(len(self.waiting[-1].members) - count, 0)
        return replaced or count >= DROP_SHARE * len(self.rows)

    def _leave(self, done: Sequence[int]) -> None:
        """Drop rows."""
        leaving = set(done)
        places = self.cache.keep([row for row in range(len(self.rows)) if row not in leaving])
        self.rows, self.drawn = [self.rows[row] for row in places], [self.drawn[row] for row in places]
        index = torch.tensor(places, dtype=torch.long, device=self.device)
        self.request, self.step, self.seeds, self.stopped = (
            tensor[index] for tensor in (self.request, self.step, self.seeds, self.stopped)
        )

    def completions(self) -> list[Completion]:
        """The responses, in the order of their requests; copies, which gradients may flow through."""
        tokens, log_probs = self.tokens.cpu(), self.log_probs.cpu()
        scalars = {name: values.cpu() for name, values in self.scalars.items()}
        found = []
        for number, request in enumerate(self.requests):
            length, reason = self.finished[number]
            part = slice(len(request.prefix), length)
            kept = {name: values[number, part].clone() for name, values in scalars.items()}
            found.append(Completion(tokens[number, part].tolist(), log_probs[number, part].clone(), reason, kept))
        check_finite(torch.cat([completion.log_probs for completion in found]))
        return found


def check_finite(log_probs: Tensor) -> None:
    """Refuse NaN and infinity.

    Raises:
        InputError: The model has diverged.
    """
    if not log_probs.isfinite().all():
        raise InputError("the model's logits are not finite (NaN or infinity): its weights have diverged")
