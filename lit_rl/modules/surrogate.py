"""The policy's loss on a micro-batch: surrogate, divergence and exploration, divided by counts of the mini-batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lit_core.sharding import summed
from lit_rl.functional.losses import aggregate, divergence, log_ratio, loss_denominator, policy_loss
from lit_rl.modules.config import LossConfig
from lit_rl.modules.experience import Experience, Totals, rows_of
from lit_rl.modules.exploration import Exploration, Selection
from lit_rl.modules.layout import Chunk
from lit_rl.modules.policy import Policy


@dataclass(frozen=True)
class Denominators:
    """What sums are divided by, counted over all micro-batches of an optimizer step on all ranks, shape ``()`` each.

    Args:
        policy: Of the policy's loss.
        divergence: Of the divergence, whose mean is over all tokens also where the policy's loss is kept to some.
        tokens: Of everything that is a mean over tokens.
    """

    policy: Tensor
    divergence: Tensor
    tokens: Tensor


class Surrogate:
    """The policy's loss.

    Args:
        loss: Its settings.
        term: Exploration term.
    """

    def __init__(self, loss: LossConfig, term: Exploration) -> None:
        self.config, self.term = loss, term

    def denominators(
        self,
        experience: Experience,
        rows: list[int],
        chunks: list[Chunk],
        selection: Selection | None,
        constant: float,
    ) -> Denominators:
        """Count what an optimizer step sees, before its first micro-batch."""
        mask = experience.mask[torch.tensor(rows, dtype=torch.long, device=experience.mask.device)]
        tokens = summed(mask.sum().float()).clamp(min=1)
        whole = loss_denominator(mask, self.config.reduction, constant, summed)
        if self.term.config.kind == "forking" and self.config.reduction == "token_mean":  # over the tokens kept
            if selection is not None:
                count = selection.learned.sum().float()
            else:
                counts = [int(experience.mask[torch.tensor(chunk.rows)].sum()) if chunk.rows else 0 for chunk in chunks]
                count = torch.tensor(float(self.term.kept_tokens(counts)), device=mask.device)
            return Denominators(summed(count).clamp(min=1), whole, tokens)
        return Denominators(whole, whole, tokens)

    def loss(
        self,
        policy: Policy,
        states: Tensor,
        chunk: Chunk,
        experience: Experience,
        scale: Denominators,
        selection: Selection | None,
        totals: Totals,
        seed: int,
        kl_coef: float,
        entropy_coef: float,
    ) -> Tensor:
        """A micro-batch's share of the mini-batch's loss, shape ``()``.

        Args:
            policy: Gives the log-probabilities.
            states: Before each response token ``(N, D)``.
            chunk: Which rows.
            experience: Fixed quantities of all rows.
            scale: From :meth:`denominators`.
            selection: Tokens chosen over the whole mini-batch; None chooses in this micro-batch.
            totals: What is logged goes there.
            seed: Decides on random choices.
            kl_coef: Weight of the divergence.
            entropy_coef: Weight of the exploration term.
        """
        rows = chunk.rows
        mask = experience.mask[torch.tensor(rows, dtype=torch.long, device=states.device)]
        targets = rows_of(experience.responses, rows)[mask]  # type: ignore[index]
        term = self.term
        found = policy.log_probs(states, targets, term.needs_entropy, term.truncation, nodes=chunk.nodes)
        if not rows:  # an idle chunk: a gradient of 0 for every weight
            return found.log_probs.sum() + states.sum() * 0
        log_probs = spread(found.log_probs, mask)
        old, advantages = (rows_of(t, rows) for t in (experience.old_log_probs, experience.advantages))
        assert old is not None
        assert advantages is not None
        chosen = self._selection(found.entropy, log_probs, advantages, mask, selection, rows, seed)
        total = self._policy_term(log_probs, old, advantages, mask, chosen, experience, rows, scale, totals)
        total = total + self._divergence_term(log_probs, experience, rows, mask, scale, kl_coef)
        bonus = self.term.bonus(found)
        if bonus is not None:
            totals.add("policy/exploration", bonus)
            total = total - entropy_coef * bonus.sum() / scale.tokens
        if found.entropy is not None:
            totals.add("policy/full_entropy", found.entropy)
        if found.kept is not None and found.kept_mass is not None:
            totals.add("policy/region_size", found.kept)
            totals.add("policy/region_mass", found.kept_mass)
        return total

    def _selection(
        self,
        entropy: Tensor | None,
        log_probs: Tensor,
        advantages: Tensor,
        mask: Tensor,
        selection: Selection | None,
        rows: list[int],
        seed: int,
    ) -> Selection:
        if selection is not None:
            index = torch.tensor(rows, device=mask.device)
            return Selection(selection.learned[index], selection.held[index])
        entropies = None if entropy is None else spread(entropy.detach(), mask)
        return self.term.select(log_probs.detach(), entropies, advantages, mask, seed)

    def _policy_term(
        self,
        log_probs: Tensor,
        old: Tensor,
        advantages: Tensor,
        mask: Tensor,
        chosen: Selection,
        experience: Experience,
        rows: list[int],
        scale: Denominators,
        totals: Totals,
    ) -> Tensor:
        config = self.config
        high = self.term.clip_high or config.clip_high
        found = policy_loss(log_probs, old, advantages, mask, config.clip_low, high, config.dual_clip, config.ratio)
        losses = found.losses + self.term.penalty(log_probs, old, chosen.held)
        weights = rows_of(experience.weights, rows)
        if weights is not None:
            losses = losses * weights
        ratio = log_ratio(log_probs.detach(), old, mask)
        totals.add("policy/approx_kl", -ratio, mask)
        totals.add("policy/clip_fraction", found.clipped, mask)
        totals.add_largest("policy/ratio_max", ratio.exp())
        if config.dual_clip is not None:
            totals.add("policy/dual_clip_fraction", found.dual_clipped, mask)
        losses = torch.where(chosen.learned, losses, 0.0)
        counted = chosen.learned if self.term.config.kind == "forking" else mask
        return aggregate(losses, counted, scale.policy, config.reduction)

    def _divergence_term(
        self,
        log_probs: Tensor,
        experience: Experience,
        rows: list[int],
        mask: Tensor,
        scale: Denominators,
        kl_coef: float,
    ) -> Tensor | float:
        reference = rows_of(experience.reference_log_probs, rows)
        if reference is None or self.config.kl_in != "loss":
            return 0.0
        kl = divergence(log_probs, reference, self.config.kl)
        return kl_coef * aggregate(kl, mask, scale.divergence, self.config.reduction)


def spread(values: Tensor, mask: Tensor) -> Tensor:
    """Values of the marked tokens ``(N,)`` at their places ``(B, T)``, 0 elsewhere."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=mask.device).masked_scatter(mask, values)
