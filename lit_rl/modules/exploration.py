"""Exploration terms on a micro-batch: what a term needs of the head, and what it adds to the loss."""

from typing import NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_core.lm_head import TokenLogProbs, Truncation
from lit_rl.functional.exploration import clip_cov_mask, forking_mask, kl_cov_mask, scaled
from lit_rl.modules.config import ExplorationConfig

KL_COV = 1.0  # coefficient of its authors


class Selection(NamedTuple):
    """Tokens that a term treats in its own way, bool ``(B, T)`` each."""

    learned: Tensor  # take part in the policy's loss
    held: Tensor  # are held near the old policy


class Exploration:
    """One exploration term.

    Args:
        config: Which one.
        vocabulary: Width of the logits.
    """

    def __init__(self, config: ExplorationConfig, vocabulary: int) -> None:
        self.config, self.vocabulary = config, vocabulary
        kind, active = config.kind, config.coefficient > 0
        self.by_entropy = kind in ("entropy", "adaptive_entropy") and (active or kind == "adaptive_entropy")
        self.selects = kind in ("forking", "kl_cov", "clip_cov")
        self.needs_entropy = self.by_entropy or kind == "forking"
        self.truncation: Truncation | None = None
        if kind == "tre_k" and config.top_k == 1:
            rank_zero_warn(
                "a region of one token has no entropy: top_k 1 stands for the min-entropy, as its authors have it"
            )
        if kind == "tre_k" and active:
            self.truncation = Truncation(top_k=config.top_k, mass_preserving=config.mass_preserving)
        elif kind == "tre_p" and active:
            self.truncation = Truncation(top_p=config.top_p, cap=config.cap, mass_preserving=config.mass_preserving)

    @property
    def clip_high(self) -> float | None:
        """Upper clip range that the term asks for."""
        return self.config.clip_high if self.config.kind == "clip_higher" else None

    def bonus(self, found: TokenLogProbs) -> Tensor | None:
        """Term of each token ``(N,)`` whose mean the policy is to raise, in nats; None without one."""
        if self.truncation is not None:
            assert found.truncated_entropy is not None  # asked for by `truncation`
            assert found.kept is not None
            if self.truncation.top_k == 1:
                return found.truncated_entropy
            return scaled(found.truncated_entropy, found.kept, self.vocabulary, self.config.scale)
        return found.entropy if self.by_entropy else None

    def adapted(self, coefficient: float, entropy: float) -> float:
        """Next coefficient of the adaptive entropy: up below the target, else down, never below 0."""
        step = self.config.adapt if entropy < self.config.target else -self.config.adapt
        return max(0.0, coefficient + step)

    def kept_tokens(self, counts: list[int]) -> int:
        """Tokens that ``forking`` averages the policy's loss over, for scopes with so many tokens each."""
        return sum(max(1, int(self.config.share * count + 0.9999)) for count in counts if count)

    def select(
        self, log_probs: Tensor, entropy: Tensor | None, advantages: Tensor, mask: Tensor, seed: int
    ) -> Selection:
        """Choose tokens, all ``(B, T)``; ``seed`` decides among those that ``clip_cov`` may take out."""
        none, config = torch.zeros_like(mask), self.config
        if config.kind == "forking":
            assert entropy is not None  # asked for by `needs_entropy`
            return Selection(forking_mask(entropy, mask, config.share), none)
        if config.kind == "kl_cov":
            return Selection(mask, kl_cov_mask(advantages, log_probs, mask, config.cov_percent))
        if config.kind == "clip_cov":
            generator = torch.Generator().manual_seed(seed)
            taken = clip_cov_mask(
                advantages, log_probs, mask, generator, config.cov_ratio, config.cov_low, config.cov_high
            )
            return Selection(mask & ~taken, none)
        return Selection(mask, none)

    def penalty(self, log_probs: Tensor, old_log_probs: Tensor, held: Tensor) -> Tensor:
        """What ``kl_cov`` adds to the loss of held tokens ``(B, T)``."""
        return torch.where(held, KL_COV * (log_probs - old_log_probs).abs(), 0.0)
