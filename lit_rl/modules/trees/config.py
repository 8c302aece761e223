"""Settings of trees, as flags have them."""

from dataclasses import dataclass
from typing import Literal

from lit_core.errors import InputError
from lit_rl.functional.branching import EntropySupport, Variant
from lit_rl.modules.config import at_least

Sampler = Literal["independent", "branching", "tree_rl", "tree_grpo", "tree_po", "spo_tree", "spo_chain", "fr3e"]
Score = Literal["semantic_entropy", "divergence", "entropy", "min_probability", "random"]
FROM_LOGITS = ("semantic_entropy", "divergence", "entropy")
CHAINED = ("spo_chain", "fr3e")  # their continuations are drawn behind scored responses
UNEVEN = (*CHAINED, "spo_tree")  # prompts have different numbers of rows


@dataclass(frozen=True)
class TreeConfig:
    """How a prompt's responses share prefixes (ROSE card, sections 2 and 5).

    Args:
        sampler: ``branching`` draws one response after the other, each from the prompt or from the position with the
            highest score of all (ROSE); ``independent`` draws all from the prompt; ``tree_rl`` draws ``chains`` and in
            each of ``rounds`` ``children`` from each of ``points`` positions of each chain's tree (EPTree);
            ``tree_grpo`` does so once, at random positions; ``tree_po`` and ``spo_tree`` branch at the ends of
            segments; ``spo_chain`` and ``fr3e`` draw ``children`` continuations of prefixes of a response to judge it.
        score: What makes a position worth branching at.
        epsilon: Probability that ``branching`` begins at the prompt instead.
        top_k: Tokens whose embeddings are compared.
        variant: Of the divergence.
        entropy_support: Entropy over the vocabulary, or over the top tokens and the one that was drawn.
        freeze_embeddings: Compare tokens by the embeddings that training started with, not by those of each rollout.
        unique_positions: Branch at a node once.
        skip_end: Do not draw an end token anew.
        skip_last: Do not branch at so many last positions of a response.
        chains: Responses that ``tree_rl``, ``tree_grpo`` and ``fr3e`` begin with.
        points: Positions that ``tree_rl`` and ``tree_grpo`` branch at in a tree, and by which ``fr3e`` cuts.
        rounds: Of ``tree_rl``.
        children: Continuations of a position.
        kept: Responses of a prompt that ``tree_rl`` learns from, a correct one among them if any; 0 from all.
        segment: Tokens of a segment of ``tree_po`` and ``spo_tree``.
        factors: Branches at the end of each segment of ``spo_tree``, the prompt first.
        every: Uncertain tokens between two cuts of ``spo_chain``.
        certain: Probability from which ``spo_chain`` takes a token for certain and does not learn from it.
    """

    sampler: Sampler = "branching"
    score: Score = "semantic_entropy"
    epsilon: float = 0.5
    top_k: int = 20
    variant: Variant = "offdiag"
    entropy_support: EntropySupport = "full"
    freeze_embeddings: bool = False
    unique_positions: bool = False
    skip_end: bool = False
    skip_last: int = 0
    chains: int = 2
    points: int = 1
    rounds: int = 1
    children: int = 3
    kept: int = 0
    segment: int = 512
    factors: tuple[int, ...] = (6, 6, 6)
    every: int = 5
    certain: float = 0.9

    def __post_init__(self) -> None:
        if not 0 <= self.epsilon <= 1:
            raise InputError(f"is a probability, in [0, 1], got {self.epsilon}", field="tree.epsilon")
        if not 0 < self.certain <= 1:
            raise InputError(f"is a probability, in (0, 1], got {self.certain}", field="tree.certain")
        names = ("top_k", "chains", "points", "rounds", "children", "segment", "every")
        at_least(1, **{f"tree.{name}": getattr(self, name) for name in names})
        at_least(0, **{"tree.skip_last": self.skip_last, "tree.kept": self.kept})
        if not self.factors or min(self.factors) < 1:
            raise InputError(f"needs numbers of at least 1, got {list(self.factors)}", field="tree.factors")

    def check_group(self, samples: int) -> None:
        """Refuse a size of groups that the sampler does not make.

        Raises:
            InputError: The two numbers.
        """
        if samples < 2 and self.sampler != "spo_chain":
            raise InputError(f"a tree needs at least 2 responses a prompt, got {samples}", field="rollout.samples")
        made = self.group_size(samples)
        if made != samples:
            raise InputError(f"{self.sampler} makes {made} responses a prompt, got {samples}", field="rollout.samples")

    def group_size(self, samples: int) -> int:
        """Responses that the sampler makes to a prompt, where ``samples`` are asked for."""
        if self.sampler == "tree_rl":
            return self.chains * (1 + self.points * self.rounds * self.children)
        if self.sampler == "tree_grpo":
            return self.chains * (1 + self.points * self.children)
        if self.sampler == "spo_tree":
            count = 1
            for factor in self.factors:
                count *= factor
            return count
        return samples
