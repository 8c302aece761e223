"""Group-relative policy optimisation and its family: Dr. GRPO, DAPO, RLOO, REINFORCE++."""

from typing import Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.sharding import summed
from lit_rl.functional import advantages as estimators
from lit_rl.functional.advantages import Scale, token_rewards
from lit_rl.methods.policy_gradient import PolicyGradient
from lit_rl.modules.config import EvaluationConfig, ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.experience import Experience
from lit_rl.modules.rollouts import Rollout
from lit_rl.problems import PromptConfig

Estimator = Literal["grpo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]


class GRPO(PolicyGradient):
    """Policy gradient with advantages from the rewards of a group, without a value function (Shao et al. 2024).

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        estimator: How rewards become advantages: centred and scaled by the group (GRPO), against the mean of the
            others (RLOO), or whitened over all tokens without or with the group's mean taken off (REINFORCE++).
        scale: What GRPO's advantages are divided by: the group's deviation, the batch's, or nothing (Dr. GRPO).
        epsilon: Added to the deviation.
        unbiased: Whether REINFORCE++ whitens with the unbiased variance.
        discount: Of later rewards, by token; only REINFORCE++ has any use for it.
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
        estimator: Estimator = "grpo",
        scale: Scale = "group",
        epsilon: float = 1e-6,
        unbiased: bool = True,
        discount: float = 1.0,
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008  read only
        loss: LossConfig = LossConfig(reduction="seq_mean_token_mean", kl_coef=0.001),  # noqa: B008
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
        if estimator != "reinforce_pp" and rollout.samples < 2:
            raise InputError(
                f"{estimator} compares the samples of a prompt: at least 2, got 1", field="rollout.samples"
            )
        self.estimator, self.scale, self.epsilon = estimator, scale, epsilon
        self.unbiased, self.discount = unbiased, discount

    def advantages(self, rollout: Rollout, experience: Experience, penalties: Tensor | None) -> None:
        mask, groups, scores = rollout.mask, rollout.group_ids, rollout.scores
        if self.estimator == "reinforce_pp":
            rewards = token_rewards(scores, mask, penalties, 1.0)
            experience.advantages = estimators.reinforce_pp(
                rewards, mask, self.discount, self.unbiased, summed
            ).advantages
            return
        if penalties is not None:  # of the whole response
            scores = scores - torch.where(mask, penalties, 0.0).sum(1)
        if self.estimator == "grpo":
            experience.advantages = estimators.grpo(scores, groups, mask, self.scale, self.epsilon, summed)
        elif self.estimator == "rloo":
            experience.advantages = estimators.rloo(scores, groups, mask)
        else:
            experience.advantages = estimators.reinforce_pp_baseline(scores, groups, mask, self.unbiased, summed)
