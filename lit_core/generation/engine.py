"""Sampling from a model in training: no copy of its weights, no padding, no finished row that is still computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_core.generation.generic_cache import GenericCache
from lit_core.generation.graphs import CudaCapture, obstacle
from lit_core.generation.requests import Completion, FinishReason, Request, StepHook
from lit_core.generation.sampling import SamplingParams, choose, keys
from lit_core.generation.shared_cache import SharedCache, is_supported
from lit_core.generation.stopping import StopStrings, stop_strings
from lit_core.samplers import mix_seed
from lit_core.sharding import gathered_weights

KV_TOKENS = 1 << 18  # of prompts and responses held at once
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


class TorchEngine:
    """Draws responses from the weights that are in training.

    Llama-like models (Llama, Mistral, Qwen2, Qwen3) read each prompt once and share its cache among the samples; rows
    that are finished leave, and waiting ones enter. Other Hugging Face causal models run through their own cache, in
    batches that shrink. The model is put into evaluation mode for the time of a call; autocast is left out, so
    sampling runs in the dtype of the weights.

    Args:
        model: A causal language model of transformers, bare or with adapters.
        tokenizer: Needed for stop strings, and for padding in models of other families.
        kv_tokens: Most tokens that the cache holds, which bounds the memory; the rest waits.
        generic: Use the model's own forward pass and cache in any case.
        graphs: Capture decode steps in CUDA graphs: None where the model is one that allows it, True to be told if it
            does not.

    Raises:
        InputError: The model has no head, a number is out of range, or graphs are asked for where there can be none.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any = None,
        kv_tokens: int = KV_TOKENS,
        generic: bool = False,
        graphs: bool | None = None,
    ) -> None:
        if kv_tokens < 1:
            raise InputError(f"must be at least 1, got {kv_tokens}", field="kv_tokens")
        if unwrap(model).get_output_embeddings() is None:
            raise InputError(f"{type(unwrap(model)).__name__} has no language-model head to draw tokens from")
        self.model, self.tokenizer, self.kv_tokens = model, tokenizer, kv_tokens
        self.shared = not generic and is_supported(model)
        self.graphs = graphs
        if graphs and (reason := self._obstacle()) is not None:
            raise InputError(f"decode steps cannot be captured: {reason}", field="graphs")

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        params: SamplingParams,
        samples: int = 1,
        seeds: Sequence[int] | int = 0,
        prefixes: Sequence[Sequence[int]] | None = None,
        hook: StepHook | None = None,
    ) -> list[Completion]:
        """Draw ``samples`` responses to each prompt.

        Args:
            prompts: Token ids of each prompt.
            params: How tokens are drawn, and when a response ends.
            samples: Responses a prompt.
            seeds: One a response, in the order of the result; or one number that they are made from.
            prefixes: First tokens of each response, to be continued.
            hook: Called at each step, in inference mode, with the model's logits ``(B, V)``, not divided by the
                temperature, and the chosen tokens ``(B,)``; the scalars ``(B,)`` that it returns by name are kept with
                the tokens.

        Returns:
            The responses: all of the first prompt, then all of the second, and so on.

        Raises:
            InputError: An empty prompt, a token that the model does not have, numbers that do not fit together, a
                request that is larger than the cache, or logits that are not finite.
        """
        if samples < 1:
            raise InputError(f"must be at least 1, got {samples}", field="samples")
        count = len(prompts) * samples
        if isinstance(seeds, int):
            seeds = [mix_seed(seeds, number) for number in range(count)]
        prefixes = prefixes or [()] * count
        if len(seeds) != count or len(prefixes) != count:
            raise InputError(f"need {count} seeds and prefixes, got {len(seeds)} and {len(prefixes)}")
        owners = [prompt for prompt in prompts for _ in range(samples)]
        requests = [Request(*parts) for parts in zip(owners, seeds, prefixes, strict=True)]
        return self.run(requests, params, hook)

    @torch.no_grad()
    def run(
        self, requests: Sequence[Request], params: SamplingParams, hook: StepHook | None = None
    ) -> list[Completion]:
        """Draw one response for each request; those with equal prompts and prefixes share what they have in common."""
        stops, vocabulary = None, unwrap(self.model).config.get_text_config().vocab_size
        if params.stop_strings:
            if self.tokenizer is None:
                raise InputError("stop strings need a tokenizer")
            stops = stop_strings(params.stop_strings, self.tokenizer, vocabulary)
        groups = _groups(requests, params.max_tokens, vocabulary)
        with (
            _evaluating(self.model),
            gathered_weights(self.model),  # on all ranks, also on one that has no requests
            torch.inference_mode(),  # small operations take a tenth less time than without gradients alone
            torch.autocast(_device(self.model).type, enabled=False),
        ):
            if not requests:
                return []
            cache = self._cache(requests, groups)
            run = _Run(cache, requests, params, stops, hook, _device(self.model))
            run.complete(groups)
        return run.completions()

    def _obstacle(self) -> str | None:
        """Why decode steps cannot be captured; asked anew for each call, as models change."""
        if not self.shared:
            return "the model runs through its own cache"
        if _device(self.model).type != "cuda":
            return f"the model is on {_device(self.model)}, not on a GPU"
        return obstacle(self.model)

    def _cache(self, requests: Sequence[Request], groups: "list[_Group]") -> Cache:
        """A cache with as many slots as the budget allows, at most as many as there are requests."""
        read = max(len(group.tokens) for group in groups)
        drawn = max(group.remaining for group in groups)
        rows = max(len(group.members) for group in groups)
        if self.kv_tokens < read + drawn:
            raise InputError(
                f"the cache holds {self.kv_tokens} tokens; the longest prompt and prefix ({read}) and the longest "
                f"response behind one ({drawn}) need {read + drawn}",
                field="kv_tokens",
            )
        fitting = self.kv_tokens // (2 * read + rows * drawn)  # a slow last sample keeps its prompt: spare slots
        prompts = min(len(groups), 2 * fitting)
        most_rows = min(len(requests), fitting * rows)
        if fitting == 0:  # not even all samples of one prompt: as many as fit
            prompts, most_rows = 1, min(rows, (self.kv_tokens - read) // drawn)
        if self.shared:
            captured = self.graphs is not False and self._obstacle() is None
            capture = CudaCapture(_device(self.model)) if captured else None
            return SharedCache(self.model, prompts, most_rows, read, drawn, capture)
        pad = getattr(self.tokenizer, "pad_token_id", None)
        return GenericCache(self.model, max(1, min(len(requests), self.kv_tokens // (read + drawn))), pad or 0)


@dataclass
class _Group:
    """Requests with the same prompt and prefix: its tokens, their numbers, and tokens drawn and still to be drawn."""

    tokens: list[int]
    members: list[int]
    drawn: int
    remaining: int

    def split(self, count: int) -> "_Group":
        """Take the first members out."""
        first, self.members = self.members[:count], self.members[count:]
        return replace(self, members=first)


def _groups(requests: Sequence[Request], max_tokens: int, vocabulary: int) -> list[_Group]:
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
        groups.append(_Group([*prompt, *prefix], members, len(prefix), remaining))
    return groups


class _Run:
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
        self.cache, self.requests, self.params, self.stops, self.hook = cache, requests, params, stops, hook
        self.device, self.look_every = device, GPU_STEPS if device.type == "cuda" else 1
        shape = len(requests), params.max_tokens
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

    def complete(self, groups: list[_Group]) -> None:
        """Run until every request is done."""
        waiting = list(reversed(groups))  # taken from the end
        steps = 0
        while waiting or self.rows:
            entering = self._entering(waiting) if self.cache.joins_running or not self.rows else []
            if entering:
                self._admit(entering)
            else:
                self._draw(self.cache.step(self.tokens[self.request, self.step - 1]), 0)
            steps += 1
            if steps % self.look_every == 0 or max(self.drawn) >= self.params.max_tokens:
                self._drop_finished(len(waiting[-1].members) if waiting and self.cache.joins_running else None)

    def _entering(self, waiting: list[_Group]) -> list[_Group]:
        """Take as many groups as there is room for; where the cache is empty, a part of one if need be."""
        entering: list[_Group] = []
        rows = 0
        while waiting and self.cache.has_room(rows + len(waiting[-1].members), len(entering) + 1):
            entering.append(waiting.pop())
            rows += len(entering[-1].members)
        if not entering and not self.rows:
            fitting = max(n for n in range(1, len(waiting[-1].members)) if self.cache.has_room(n, 1))
            entering = [waiting[-1].split(fitting)]
        return entering

    def _admit(self, groups: list[_Group]) -> None:
        """Read the prompts of groups, and draw the first token of each of their rows."""
        first = len(self.rows)
        logits = self.cache.admit([group.tokens for group in groups], [len(group.members) for group in groups])
        for group in groups:
            self.rows += group.members
            self.drawn += [group.drawn] * len(group.members)
        new = self.rows[first:]

        def lengthened(tensor: Tensor, values: list[int]) -> Tensor:
            return torch.cat([tensor, torch.tensor(values, device=self.device)])

        self.request = lengthened(self.request, new)
        self.step = lengthened(self.step, self.drawn[first:])
        self.seeds = lengthened(self.seeds, [self.requests[number].seed for number in new])
        self.stopped = lengthened(self.stopped, [-1] * len(new))
        self._draw(logits, first)

    def _draw(self, logits: Tensor, first: int) -> None:
        """Choose a token for each row from ``first`` on."""
        request, step, stopped = self.request[first:], self.step[first:], self.stopped[first:]
        choice = choose(logits, keys(self.seeds[first:], step), self.params)
        self.tokens[request, step], self.log_probs[request, step] = choice
        if self.hook is not None:
            for name, values in self.hook(logits, choice.tokens).items():
                kept = self.scalars.setdefault(name, torch.zeros_like(self.log_probs))
                kept[request, step] = values.float()
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

    def _drop_finished(self, waiting: int | None) -> None:
        """Let finished rows leave; a few stay until more are, or until so many waiting ones fit instead of them."""
        stopped = self.stopped.tolist()
        most = self.params.max_tokens
        done = [row for row, drawn in enumerate(self.drawn) if stopped[row] >= 0 or drawn >= most]
        if not done:
            return
        full = any(self.drawn[row] >= most for row in done)
        replaced = waiting is not None and self.cache.has_room(waiting - len(done), 0)
        if not (full or replaced or len(done) >= DROP_SHARE * len(self.rows)):
            return
        for row in done:
            ended = stopped[row] >= 0
            self.finished[self.rows[row]] = (stopped[row] + 1, "stop") if ended else (most, "length")
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
        if not torch.cat([completion.log_probs for completion in found]).isfinite().all():
            raise InputError("the model's logits are not finite (NaN or infinity): its weights have diverged")
        return found


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout; every module goes back to the mode that it had."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _device(model: nn.Module) -> torch.device:
    return unwrap(model).get_input_embeddings().weight.device
