"""Choosing the next token, so that a request gets the same ones whoever shares its batch.

Each request has a seed of its own. The number that decides on its token at a step is a hash of the seed and the step,
not the next one of a stream that all requests draw from.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lit_core.errors import InputError

CHUNK_LOGITS = 1 << 21  # worked on at once on a CPU, 8 MiB: much larger tensors are fetched from the system each time

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


def keys(seeds: Tensor, steps: Tensor) -> Tensor:
    """One number for each seed and step (both Long ``(B,)``), Long ``(B,)``: SplitMix64 twice."""
    return _mix(_mix(seeds) + steps)


def uniforms(keys: Tensor, count: int) -> Tensor:
    """The first numbers in (0, 1) of each key's own stream, float64 ``(B, count)``; SplitMix64."""
    state = keys[:, None] + _GOLDEN * torch.arange(count, device=keys.device)
    return ((_mix(state) >> 11 & ((1 << 53) - 1)).double() + 0.5) / (1 << 53)


def _mix(state: Tensor) -> Tensor:
    """The finaliser of SplitMix64; int64 products wrap around as unsigned ones do."""
    state = state + _GOLDEN
    state = (state ^ _shifted(state, 30)) * _FIRST
    state = (state ^ _shifted(state, 27)) * _SECOND
    return state ^ _shifted(state, 31)


def _shifted(state: Tensor, bits: int) -> Tensor:
    """Shift to the right with zeros from the left, which int64 has no operation for."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def choose(logits: Tensor, keys: Tensor, params: SamplingParams) -> Choice:
    """Choose a token for each row.

    Args:
        logits: ``(B, V)``.
        keys: From :func:`keys`, Long ``(B,)``.
        params: Temperature and truncation.

    Returns:
        The tokens, with their log-probabilities over the whole vocabulary under the temperature (1 where it is 0):
        truncation is left out of them, as trainers compute them.
    """
    rows = len(logits) if logits.is_cuda else max(1, CHUNK_LOGITS // logits.shape[1])
    parts = [_choose(*part, params) for part in zip(logits.split(rows), keys.split(rows), strict=True)]
    return parts[0] if len(parts) == 1 else Choice(*map(torch.cat, zip(*parts, strict=True)))


def _choose(logits: Tensor, keys: Tensor, params: SamplingParams) -> Choice:
    logits = logits.float()
    rows, size = logits.shape
    width = math.isqrt(size)
    padded = logits.new_empty(rows, -(-size // width) * width)  # whole blocks of tokens
    padded[:, size:] = 0
    largest = logits.amax(-1, keepdim=True)
    scale = params.temperature or 1.0
    weights = torch.sub(logits, largest, out=padded[:, :size])
    if scale != 1:
        weights.div_(scale)
    weights.exp_()  # probabilities up to a factor: no log-softmax is needed
    total = weights.sum(-1, keepdim=True)
    if params.temperature == 0:
        tokens = logits.argmax(-1)
    else:
        _truncate(weights, params)
        tokens = _draw(padded.view(rows, -1, width), keys).clamp(max=size - 1)  # NaN must not lead outside
    return Choice(tokens, ((logits.gather(-1, tokens[:, None]) - largest) / scale - total.log()).squeeze(-1))


def _truncate(weights: Tensor, params: SamplingParams) -> None:
    """Set to 0 in place what ``top_k`` and ``top_p`` leave out."""
    vocabulary = weights.shape[-1]
    count = min(params.top_k or vocabulary, vocabulary)
    if count == vocabulary and params.top_p == 1:
        return
    best = weights.topk(count, dim=-1) if count < vocabulary else weights.sort(dim=-1, descending=True, stable=True)
    probabilities = best.values / best.values.sum(-1, keepdim=True)
    before = probabilities.cumsum(-1) - probabilities
    weights.zero_().scatter_(-1, best.indices, torch.where(before < params.top_p, best.values, 0.0))


def _draw(blocks: Tensor, keys: Tensor) -> Tensor:
    """A token of each row of ``(B, blocks, width)`` in proportion to its weight: first a block, then one of its tokens.

    Both by an exponential race (the Gumbel-max rule without its logarithms), which rounding of the weights turns
    over far more rarely than an inverted cumulative sum; two stages keep the draws to twice the vocabulary's root.
    """
    rows, count, width = blocks.shape
    times = -uniforms(keys, count + width).log()
    block = (blocks.sum(-1) / times[:, :count]).argmax(-1)
    inside = blocks[torch.arange(rows, device=blocks.device), block]
    return block * width + (inside / times[:, count:]).argmax(-1)
