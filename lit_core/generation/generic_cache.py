"""Decoding of any Hugging Face causal language model through its own forward pass and cache."""

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn

from lit_core.backbones import cache_name, unwrap


class GenericCache:
    """Rows that began together, padded on the left so that they end together.

    Args:
        model: A causal language model, bare or with adapters, in evaluation mode.
        rows: Most rows.
        pad_id: Fills the left of shorter prompts.
    """

    joins_running = False  # all rows of the model's own cache have one length

    def __init__(self, model: nn.Module, rows: int, pad_id: int) -> None:
        self.model, self.most_rows, self.pad_id = unwrap(model), rows, pad_id
        self.device = self.model.get_input_embeddings().weight.device
        self.cache_name = cache_name(self.model)
        taken = signature(self.model.forward).parameters
        self.takes_positions = "position_ids" in taken
        self.last_only: dict[str, int] = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self.count = 0
        self.cache: Any = None

    def __len__(self) -> int:
        return self.count

    def has_room(self, rows: int, prompts: int) -> bool:
        """Whether so many further prompts with so many rows in all fit."""
        return self.count + rows <= self.most_rows

    def admit(self, prompts: Sequence[Sequence[int]], counts: Sequence[int]) -> Tensor:
        """Read prompts, each once, and begin rows of them; as :meth:`SharedCache.admit`, with no row running."""
        width = max(len(prompt) for prompt in prompts)
        ids = [[self.pad_id] * (width - len(prompt)) + list(prompt) for prompt in prompts]
        self.mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts], device=self.device)
        self.cache = None
        logits = self._forward(torch.tensor(ids, device=self.device), (self.mask.cumsum(1) - 1).clamp(min=0))
        rows = torch.arange(len(prompts)).repeat_interleave(torch.tensor(counts)).to(self.device)
        self.cache.batch_select_indices(rows)
        self.mask, self.count = self.mask[rows], len(rows)
        return logits[rows]

    def step(self, tokens: Tensor) -> Tensor:
        """Take the last token of each row (Long ``(B,)``) and return the logits of the next ``(B, V)``."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(tokens), 1)], dim=1)
        return self._forward(tokens[:, None], self.mask.sum(1, keepdim=True) - 1)

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all other rows; as :meth:`SharedCache.keep`."""
        self.count = len(rows)
        if rows:
            chosen = torch.tensor(rows, device=self.device)
            self.cache.batch_select_indices(chosen)
            self.mask = self.mask[chosen]
        return list(rows)

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        extra: dict[str, Any] = {"position_ids": positions} if self.takes_positions else {}
        extra |= {self.cache_name: self.cache, **self.last_only}
        found = self.model(input_ids=ids, attention_mask=self.mask, use_cache=True, **extra)
        self.cache = found[self.cache_name]
        return found.logits[:, -1]
