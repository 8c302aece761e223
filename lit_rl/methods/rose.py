"""ROSE: responses that branch where the choice of words differs in meaning, with credit for each segment.

Baselines of its paper are settings of it: other places to branch, other shapes of trees, other estimates of what a
segment is worth, and no tree at all.
"""

from collections.abc import Callable
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, unwrap
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.samplers import mix_seed
from lit_core.sharding import summed
from lit_rl.functional import advantages as flat
from lit_rl.functional import tree_advantages as trees
from lit_rl.functional.branching import mean_cosine
from lit_rl.functional.forest import Forest
from lit_rl.methods.policy_gradient import PolicyGradient
from lit_rl.modules.config import EvaluationConfig, ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.experience import Experience
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.trees.chains import collect_chains, collect_fr3e
from lit_rl.modules.trees.collect import collect_trees
from lit_rl.modules.trees.config import CHAINED, FROM_LOGITS, UNEVEN, TreeConfig
from lit_rl.modules.trees.scores import check_table, unit_embeddings
from lit_rl.modules.trees.selection import selected
from lit_rl.modules.trees.statistics import branch_statistics
from lit_rl.problems import ProblemBatch, PromptConfig

Estimator = Literal[
    "segments", "grpo", "dr_grpo", "rloo", "spo_tree", "spo_tree_scaled", "tree_rl", "tree_rl_code", "tree_po",
    "tree_po_by_size", "tree_grpo", "tree_grpo_code",
]  # fmt: skip
TABLE_KEY = "lit_rl_embeddings"

ESTIMATORS: dict[str, Callable[[Forest, Tensor, Tensor], Tensor]] = {
    "grpo": lambda forest, scores, mask: flat.grpo(scores, forest.group_ids, mask, "group", 1e-6, summed),
    "dr_grpo": lambda forest, scores, mask: flat.grpo(scores, forest.group_ids, mask, "none", 1e-6, summed),
    "rloo": lambda forest, scores, mask: flat.rloo(scores, forest.group_ids, mask),
    "spo_tree": lambda forest, scores, mask: trees.spo_tree(forest, scores, mask).advantages,
    "spo_tree_scaled": lambda forest, scores, mask: trees.spo_tree(forest, scores, mask, "grpo").advantages,
    "tree_po": lambda forest, scores, mask: trees.tree_po(forest, scores, mask, "average", reduce=summed),
    "tree_po_by_size": lambda forest, scores, mask: trees.tree_po(forest, scores, mask, "group_size", reduce=summed),
    "tree_grpo": lambda forest, scores, mask: trees.tree_grpo(forest, scores, mask, "sum"),
    "tree_grpo_code": lambda forest, scores, mask: trees.tree_grpo(forest, scores, mask, "code"),
}


class ROSE(PolicyGradient):
    """Semantically diverse tree rollouts with segment advantages (arXiv 2601.05053).

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        tree: How responses branch.
        estimator: What a token is worth: ``segments`` is ROSE's (eqs. 4-8), ``grpo``, ``dr_grpo`` and ``rloo`` look at
            whole responses, the others are those of the methods they are named after. ``spo_chain`` and ``fr3e``
            among the samplers bring their own.
        length_penalty: How much correct responses longer than the shortest one lose (alpha); 0 nothing.
        share: Whether a token that several responses share counts once instead of once for each.
        rollout: How responses are drawn.
        loss: The policy's loss.
        update: Epochs, mini-batches, layout.
        exploration: What keeps the policy exploring.
        prompt: How prompts become tokens.
        evaluation: How responses are drawn for validation and test.
        reward_model: Folder or hub id of a reward model, for the task ``preference``.
        reward_workers: Processes for rewards that take long; 0 computes them in this one, without a limit.
        reward_seconds: Limit of such a reward for one response.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule over the updates.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    def __init__(
        self,
        backbone: str,
        tree: TreeConfig = TreeConfig(),  # noqa: B008  read only
        estimator: Estimator = "segments",
        length_penalty: float = 1.0,
        share: bool = False,
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(reduction="const_norm", kl_coef=0.001),  # noqa: B008
        update: UpdateConfig = UpdateConfig(),  # noqa: B008
        exploration: ExplorationConfig = ExplorationConfig(),  # noqa: B008
        prompt: PromptConfig = PromptConfig(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        reward_model: str | None = None,
        reward_workers: int = 2,
        reward_seconds: float = 5.0,
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-6, weight_decay=0.01),
        schedule: Schedule = Schedule(name="constant"),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(
            backbone, rollout, loss, update, exploration, prompt, evaluation, reward_model, reward_workers,
            reward_seconds, loading, lora, quantization, optimizer, schedule, max_grad_norm,
        )  # fmt: skip
        self.save_hyperparameters()
        tree.check_group(rollout.samples)
        if not length_penalty >= 0:
            raise InputError(f"must be at least 0, got {length_penalty}", field="length_penalty")
        self.calibrated = estimator == "segments" and length_penalty > 0 and tree.sampler not in CHAINED
        if self.calibrated and loss.kl_coef > 0 and loss.kl_in == "reward":
            raise InputError("a length penalty needs rewards in [0, 1]; kl_in: loss", field="length_penalty")
        if rollout.dynamic and tree.sampler in UNEVEN:
            raise InputError(f"{tree.sampler} makes groups of different sizes", field="rollout.dynamic")
        if tree.kept and estimator not in ("tree_rl", "tree_rl_code"):
            raise InputError(f"only tree_rl learns from some of the responses, not {estimator}", field="tree.kept")
        if share and estimator != "segments":
            raise InputError(f"counts shared tokens of segments, not of {estimator}", field="share")
        self.tree, self.estimator, self.length_penalty, self.share = tree, estimator, length_penalty, share
        self.table: Tensor | None = None  # unit embeddings that scores compare

    def configure_model(self) -> None:
        super().configure_model()
        size = len(unwrap(self.policy.model).get_input_embeddings().weight)
        if self.tree.top_k > size:
            raise InputError(
                f"must be at most the {size} tokens of the vocabulary, got {self.tree.top_k}", field="tree.top_k"
            )

    def collect(self, batch: ProblemBatch, seed: int, first_group: int) -> Rollout:
        given = (self.policy, batch, self.tree, self.rollout, seed, self.scorer, self.device)
        if self.tree.sampler == "independent":
            return super().collect(batch, seed, first_group)
        if self.tree.sampler == "spo_chain":
            return collect_chains(*given)
        if self.tree.sampler == "fr3e":
            return collect_fr3e(*given)
        found, grown = collect_trees(*given, self._embeddings(), first_group)
        if not self.tree.freeze_embeddings:
            self.table = None  # as large as the table itself
        statistics = branch_statistics(grown)
        pairs = summed(torch.tensor(list(statistics.values()), device=self.device))
        self.log_dict(dict(zip(statistics, pairs[:, 0] / pairs[:, 1].clamp(min=1), strict=True)))
        return found

    def advantages(self, rollout: Rollout, experience: Experience, penalties: Tensor | None) -> None:
        scores, mask = rollout.scores, rollout.mask
        if rollout.credit is not None:
            experience.advantages = rollout.credit
            return
        if penalties is not None:  # of the whole response
            scores = scores - torch.where(mask, penalties, 0.0).sum(1)
        if self.calibrated and not bool(((scores >= 0) & (scores <= 1)).all()):
            raise InputError(
                f"a length penalty needs rewards in [0, 1], got {float(scores.min()):g} to {float(scores.max()):g}",
                field="length_penalty",
            )
        forest = rollout.forest
        if self.estimator == "segments":
            experience.advantages = trees.rose(forest, scores, mask, self.length_penalty, self.share)
        elif self.estimator in ("tree_rl", "tree_rl_code"):
            reweight: trees.Reweight = "leaves" if self.estimator == "tree_rl" else "code"
            experience.advantages = trees.tree_rl(forest, scores, mask, reweight, self._selected(forest, scores))
        else:
            experience.advantages = ESTIMATORS[self.estimator](forest, scores, mask)

    def _selected(self, forest: Forest, scores: Tensor) -> Tensor | None:
        """Responses that are learned from, where a tree has more than ``tree.kept``."""
        if not self.tree.kept:
            return None
        return selected(forest, scores, self.tree.kept, mix_seed(self.loading.seed, self.global_step))

    def _embeddings(self) -> Tensor | None:
        """The embedding table at length 1: of the present weights, or of the first ones."""
        if self.tree.sampler != "branching" or self.tree.score not in FROM_LOGITS:
            return None
        if self.table is None:
            self.table = unit_embeddings(self.policy.model)
        check_table(self.table, self.policy.model)
        self.log("rollout/table_cosine", mean_cosine(self.table))
        return self.table

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.tree.freeze_embeddings and self.table is not None:
            checkpoint[TABLE_KEY] = self.table.cpu()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if TABLE_KEY in checkpoint:
            self.table = checkpoint[TABLE_KEY].to(self.device)
            check_table(self.table, self.policy.model)
