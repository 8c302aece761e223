"""Trust-region entropy (arXiv 2602.03635): PPO that explores among the tokens it finds plausible itself."""

import torch
from lightning.pytorch.cli import OptimizerCallable

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.optim import Schedule
from lit_rl.methods.ppo import PPO
from lit_rl.modules.config import (
    CriticConfig,
    EvaluationConfig,
    ExplorationConfig,
    LossConfig,
    RolloutConfig,
    UpdateConfig,
)
from lit_rl.problems import PromptConfig


class TRE(PPO):
    """PPO with the entropy of the policy renormalised on its trust region, a set of tokens, as a bonus.

    The loss is ``L_PPO - coefficient * mean(TRE)`` over response tokens (card, section 2.2); nothing else differs from
    :class:`PPO`, and every other exploration term is a value of ``exploration.kind``.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        discount: gamma of the advantage estimates.
        decay: lambda of the advantage estimates.
        critic: The value function.
        rollout: How responses are drawn.
        loss: The policy's loss; the authors' has a dual clip of 3.
        update: Epochs, mini-batches, layout.
        exploration: The trust region, and the weight of its entropy.
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
        max_grad_norm: Gradients are scaled down to this norm, the policy's and the critic's each; None never.
    """

    def __init__(
        self,
        backbone: str,
        discount: float = 1.0,
        decay: float = 1.0,
        critic: CriticConfig = CriticConfig(),  # noqa: B008  read only
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(dual_clip=3.0),  # noqa: B008
        update: UpdateConfig = UpdateConfig(mini_batches=8),  # noqa: B008
        exploration: ExplorationConfig = ExplorationConfig(kind="tre_k"),  # noqa: B008
        prompt: PromptConfig = PromptConfig(),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(samples=1, top_p=0.7),  # noqa: B008
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
            backbone, discount, decay, critic, rollout, loss, update, exploration, prompt, evaluation, reward_model,
            reward_workers, reward_seconds, loading, lora, quantization, optimizer, schedule, max_grad_norm,
        )  # fmt: skip
        self.save_hyperparameters()
