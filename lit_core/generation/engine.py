"""Sampling from a model in training: no copy of its weights, no padding, no finished row that is still computed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_core.generation.generic_cache import GenericCache
from lit_core.generation.graphs import CudaCapture, obstacle
from lit_core.generation.growth import Growth, Planner, Response
from lit_core.generation.requests import Completion, Request, StepHook
from lit_core.generation.run import Cache, Group, Run, grouped
from lit_core.generation.sampling import SamplingParams
from lit_core.generation.shared_cache import SharedCache, is_supported
from lit_core.generation.stopping import StopStrings, stop_strings
from lit_core.samplers import mix_seed
from lit_core.sharding import gathered_weights

KV_TOKENS = 1 << 18  # of prompts and responses held at once


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
        stops = self._stops(params)
        groups = grouped(requests, params.max_tokens, self._vocabulary)
        with self._sampling():
            if not requests:
                return []
            run = Run(self._cache(requests, groups), requests, params, stops, hook, _device(self.model))
            run.complete(groups)
        return run.completions()

    @torch.no_grad()
    def grow(
        self,
        prompts: Sequence[Sequence[int]],
        planner: Planner,
        params: SamplingParams,
        hook: StepHook | None = None,
        reuse: bool | None = None,
    ) -> list[list[Response]]:
        """Draw a tree of responses to each prompt, in rounds that a planner decides on.

        Trees grow independently of each other: none waits for the round of another one.

        Args:
            prompts: Token ids of each prompt.
            planner: Says what is drawn next, each time that all responses so far of a prompt are finished.
            params: How tokens are drawn, and when a response ends.
            hook: As in :meth:`generate`.
            reuse: Begin branches from the cached keys and values of the response that they leave. Without, or where a
                model runs through its own cache, the prefix is read again. None does what lets more rows run at a time:
                what branches may begin from takes a part of the budget.

        Returns:
            The responses to each prompt, prefixes included, in the order in which they were asked for.

        Raises:
            InputError: As in :meth:`generate`.
            ValueError: The planner asks for what cannot be.
        """
        stops = self._stops(params)
        grouped([Request(prompt, 0) for prompt in prompts], params.max_tokens, self._vocabulary)  # checks the tokens
        with self._sampling():
            if not prompts:
                return []
            if reuse is None:
                reuse = self._reusing_admits_more(prompts, planner, params.max_tokens)
            reuse = reuse and self.shared
            cache = self._tree_cache(prompts, planner, params.max_tokens, reuse)
            growth = Growth(cache, planner, prompts, params, stops, hook, _device(self.model), reuse)
            growth.complete(growth.begin())
        return growth.trees

    @property
    def _vocabulary(self) -> int:
        return int(unwrap(self.model).config.get_text_config().vocab_size)

    def _stops(self, params: SamplingParams) -> StopStrings | None:
        if not params.stop_strings:
            return None
        if self.tokenizer is None:
            raise InputError("stop strings need a tokenizer")
        return stop_strings(params.stop_strings, self.tokenizer, self._vocabulary)

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        with (
            _evaluating(self.model),
            gathered_weights(self.model),  # on all ranks, also on one that has no requests
            torch.inference_mode(),  # small operations take a tenth less time than without gradients alone
            torch.autocast(_device(self.model).type, enabled=False),
        ):
            yield

    def _obstacle(self) -> str | None:
        """Why decode steps cannot be captured; asked anew for each call, as models change."""
        if not self.shared:
            return "the model runs through its own cache"
        if _device(self.model).type != "cuda":
            return f"the model is on {_device(self.model)}, not on a GPU"
        return obstacle(self.model)

    def _cache(self, requests: Sequence[Request], groups: list[Group]) -> Cache:
        """A cache with as many slots as the budget allows, at most as many as there are requests."""
        read = max(len(group.tokens) for group in groups)
        drawn = max(group.remaining for group in groups)
        rows = max(len(group.members) for group in groups)
        self._check_budget(read + drawn, f"prompt and prefix ({read}) and the longest response behind one ({drawn})")
        fitting = self.kv_tokens // (2 * read + rows * drawn)  # a slow last sample keeps its prompt: spare slots
        prompts = min(len(groups), 2 * fitting)
        most_rows = min(len(requests), fitting * rows)
        if fitting == 0:  # not even all samples of one prompt: as many as fit
            prompts, most_rows = 1, min(rows, (self.kv_tokens - read) // drawn)
        if self.shared:
            return self._shared_cache(prompts, most_rows, read, drawn)
        return self._generic_cache(min(len(requests), self.kv_tokens // (read + drawn)))

    def _reusing_admits_more(self, prompts: Sequence[Sequence[int]], planner: Planner, drawn: int) -> bool:
        """Whether at least as many rows run at a time where branches begin from what is stored."""
        read, most = max(map(len, prompts)), len(prompts) * planner.width
        reusing = self.kv_tokens // (read + (planner.width + planner.responses) * drawn) * planner.width
        return min(reusing, most) >= min(self.kv_tokens // (read + 2 * drawn - 1), most)

    def _tree_cache(self, prompts: Sequence[Sequence[int]], planner: Planner, drawn: int, reuse: bool) -> Cache:
        """A cache for as many trees at once as the budget allows."""
        read = max(map(len, prompts))
        if reuse:
            each = read + (planner.width + planner.responses) * drawn  # running rows, and what branches may begin from
            self._check_budget(each, f"prompt ({read}) and a tree of {planner.responses} responses of {drawn} tokens")
            trees = min(len(prompts), self.kv_tokens // each)
            return self._shared_cache(trees, trees * planner.width, read, drawn)
        read += drawn - 1  # a prefix leaves one token to draw
        self._check_budget(read + drawn, f"prompt and prefix ({read}) and a response ({drawn})")
        rows = min(len(prompts) * planner.width, self.kv_tokens // (read + drawn))
        return self._shared_cache(rows, rows, read, drawn) if self.shared else self._generic_cache(rows)

    def _shared_cache(self, prompts: int, rows: int, read: int, drawn: int) -> SharedCache:
        captured = self.graphs is not False and self._obstacle() is None
        capture = CudaCapture(_device(self.model)) if captured else None
        return SharedCache(self.model, prompts, rows, read, drawn, capture)

    def _generic_cache(self, rows: int) -> GenericCache:
        return GenericCache(self.model, max(1, rows), getattr(self.tokenizer, "pad_token_id", None) or 0)

    def _check_budget(self, needed: int, what: str) -> None:
        if self.kv_tokens < needed:
            raise InputError(
                f"the cache holds {self.kv_tokens} tokens; the longest {what} need {needed}", field="kv_tokens"
            )


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
