"""Proximal policy optimisation with a value function (Schulman et al. 2017) for language models."""

from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, Quantization, unwrap
from lit_core.optim import Schedule, parameter_groups
from lit_core.sharding import summed
from lit_rl.functional.advantages import gae, token_rewards
from lit_rl.functional.losses import aggregate, explained_variance, value_loss
from lit_rl.functional.masking import whiten
from lit_rl.methods.policy_gradient import PolicyGradient
from lit_rl.modules.config import (
    CriticConfig,
    EvaluationConfig,
    ExplorationConfig,
    LossConfig,
    RolloutConfig,
    UpdateConfig,
)
from lit_rl.modules.experience import Experience, Totals, rows_of
from lit_rl.modules.layout import Chunk
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.surrogate import Denominators, spread
from lit_rl.modules.value import Critic, ValueHead
from lit_rl.problems import PromptConfig


class PPO(PolicyGradient):
    """Clipped policy gradient with generalised advantage estimates.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        discount: gamma of the advantage estimates.
        decay: lambda of the advantage estimates.
        critic: The value function.
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
        max_grad_norm: Gradients are scaled down to this norm, the policy's and the critic's each; None never.
    """

    def __init__(
        self,
        backbone: str,
        discount: float = 1.0,
        decay: float = 1.0,
        critic: CriticConfig = CriticConfig(),  # noqa: B008  read only
        rollout: RolloutConfig = RolloutConfig(),  # noqa: B008
        loss: LossConfig = LossConfig(),  # noqa: B008
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
        self.discount, self.decay, self.critic_config = discount, decay, critic

    def configure_model(self) -> None:
        built = "policy" in dict(self.named_children())
        super().configure_model()
        if built:
            return
        if self.critic_config.kind == "head":
            self.critic: nn.Module = ValueHead(unwrap(self.policy.model).config.hidden_size)
            return
        critic = Critic(self.backbone, self.loading, self.lora, self.quantization)
        if self.device_mesh is not None:
            critic.shard(self.device_mesh)
        self.critic = critic

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """The policy's groups and the critic's, whose learning rate is its own."""
        critic = [group | {"lr": self.critic_config.lr} for group in parameter_groups(self.critic)]
        return [*super().optimizer_groups(), *critic]

    def clipped_apart(self) -> list[list[nn.Parameter]]:
        return [*super().clipped_apart(), [p for p in self.critic.parameters() if p.requires_grad]]

    def resting(self) -> Iterable[nn.Parameter]:
        """The policy while the critic warms up: neither weight decay nor the states of a shared trunk may move it."""
        return self.policy.parameters() if self.global_step < self.critic_config.warmup else ()

    def learns_from_all(self) -> bool:
        """The value function does."""
        return True

    def values(self, chunk: Chunk, states: Tensor | None = None) -> Tensor:
        """Values of the states before each response token of a chunk ``(N,)``; ``states`` are the policy's."""
        if isinstance(self.critic, ValueHead):
            return self.critic(self.policy.states(chunk) if states is None else states)
        return self.critic(chunk)

    def advantages(self, rollout: Rollout, experience: Experience, penalties: Tensor | None) -> None:
        mask = rollout.mask
        values = self.passes.by_token(rollout.sequences, rollout.responses, mask, lambda chunk, _: self.values(chunk))
        found = gae(token_rewards(rollout.scores, mask, penalties, 1.0), values, mask, self.discount, self.decay)
        experience.values, experience.returns = values, found.returns
        experience.advantages = whiten(found.advantages, mask, reduce=summed)
        self.log("value/explained_variance", explained_variance(values, found.returns, mask).nan_to_num(0.0))

    def chunk_loss(
        self,
        chunk: Chunk,
        experience: Experience,
        scale: Denominators,
        selection: Any,
        totals: Totals,
        seed: int,
    ) -> Tensor:
        states = self.policy.states(chunk)
        values = self.values(chunk, states)
        loss = self._value_loss(values, chunk, experience, scale, totals)
        if self.global_step < self.critic_config.warmup:
            return loss + states.sum() * 0
        return loss + self.surrogate.loss(
            self.policy, states, chunk, experience, scale, selection, totals, seed, self.kl_coef, self.entropy_coef
        )

    def _value_loss(
        self, values: Tensor, chunk: Chunk, experience: Experience, scale: Denominators, totals: Totals
    ) -> Tensor:
        if not chunk.rows:
            return values.sum() * 0
        mask, old, returns = (rows_of(t, chunk.rows) for t in (experience.mask, experience.values, experience.returns))
        assert mask is not None
        assert old is not None
        assert returns is not None
        found = value_loss(spread(values, mask), old, returns, mask, self.critic_config.clip)
        totals.add("value/loss", found.losses, mask)
        totals.add("value/clip_fraction", found.clipped, mask)
        return self.critic_config.coefficient * aggregate(found.losses, mask, scale.tokens)
