"""Choosing the next token, so that a request gets the same ones whoever shares its batch.

Each request has a seed of its own. The number that decides on its token at a step is a hash of the seed and the step,
not the next one of a stream that all requests draw from.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_core.errors import InputError

_GOLDEN = -0x61C8864680B583EB  # 2^64 over the golden ratio, as a signed number: the increment of SplitMix64
_FIRST, _SECOND = -0x40A7B892E31B1A47, -0x6B2FB644ECCEEE15  # its multipliers


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn.

    Args:
        temperature: Divides the logits; 0 always takes the most probable token.
        top_p: Draw only from the most probable tokens up to this mass, the one that crosses it included.
        top_k: Draw only from this many most probable tokens; None from all.
        max_tokens: Most tokens of a response.
        stop_ids: Tokens that end a response; they belong to it.
        stop_strings: Texts that end a response; the token that completes one belongs to it.

    Raises:
        InputError: A field is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None
    max_tokens: int = 256
    stop_ids: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise InputError(f"must be at least 0, got {self.temperature}", field="temperature")
        if not 0 < self.top_p <= 1:
            raise InputError(f"must be above 0 and at most 1, got {self.top_p}", field="top_p")
        for name, value in (("top_k", self.top_k), ("max_tokens", self.max_tokens)):
            if value is not None and value < 1:
                raise InputError(f"must be at least 1, got {value}", field=name)
        if "" in self.stop_strings:
            raise InputError("an empty text would stop every response", field="stop_strings")


class Choice(NamedTuple):
    """The next token of each row (Long ``(B,)``) and its log-probability under the temperature (float32 ``(B,)``)."""

    tokens: Tensor
    log_probs: Tensor


def uniforms(seeds: Tensor, steps: Tensor) -> Tensor:
    """Numbers in [0, 1) from seeds and step numbers (both Long ``(B,)``), float64 ``(B,)``; SplitMix64 twice."""
    return (_mix(_mix(seeds) + steps) >> 11 & ((1 << 53) - 1)).double() / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64; int64 products wrap around as unsigned ones do."""
    state = state + _GOLDEN
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left, which int64 has no operation for."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def choose(logits: Tensor, draws: Tensor, params: SamplingParams) -> Choice:
    """Choose a token for each row.

    Args:
        logits: ``(B, V)``.
        draws: Numbers in [0, 1), float64 ``(B,)``.
        params: Temperature and truncation.

    Returns:
        The tokens, with their log-probabilities over the whole vocabulary under the temperature (1 where it is 0):
        truncation is left out of them, as trainers compute them.
    """
    logits = logits.float()
    tempered = logits / params.temperature if params.temperature > 0 else logits
    logs = tempered.log_softmax(-1)
    tokens = logits.argmax(-1) if params.temperature == 0 else _draw(logs, draws, params)
    return Choice(tokens, logs.gather(-1, tokens[:, None]).squeeze(-1))


def _draw(logs: Tensor, draws: Tensor, params: SamplingParams) -> Tensor:
    """Invert the distribution function, over the tokens in the order of the vocabulary or of their probability."""
    vocabulary = logs.shape[-1]
    count = min(params.top_k or vocabulary, vocabulary)
    if count == vocabulary and params.top_p == 1:
        return _inverted(logs.exp(), draws)
    best = logs.topk(count, dim=-1) if count < vocabulary else logs.sort(dim=-1, descending=True, stable=True)
    probabilities = best.values.exp()
    probabilities = probabilities / probabilities.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    kept = torch.where(before < params.top_p, probabilities, 0.0)
    return best.indices.gather(-1, _inverted(kept, draws)[:, None]).squeeze(-1)


def _inverted(weights: Tensor, draws: Tensor) -> Tensor:
    """Rows' first place whose cumulative weight exceeds the draw's share of the whole."""
    cumulative = weights.double().cumsum(-1)
    target = draws[:, None].to(cumulative.device) * cumulative[:, -1:]
    place = torch.searchsorted(cumulative, target, right=True).squeeze(-1)
    last = weights.shape[-1] - 1 - weights.flip(-1).gt(0).int().argmax(-1)
    return torch.minimum(place, last)  # rounding must not choose what has no weight
