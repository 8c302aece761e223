"""Supervised fine-tuning on solutions: the warm start of reinforcement learning."""

from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, unwrap
from lit_core.generation.engine import KV_TOKENS
from lit_core.lm_head import cross_entropy
from lit_core.optim import Schedule
from lit_core.sharding import full_tensor, share_of_mean
from lit_rl.methods.policy_method import PolicyMethod
from lit_rl.modules.config import EvaluationConfig
from lit_rl.modules.layout import Sequences
from lit_rl.modules.passes import CPU_TOKENS, GPU_TOKENS
from lit_rl.problems import DemonstrationCollator, ProblemBatch, PromptConfig


class SFT(PolicyMethod):
    """Next-token prediction of solutions behind their prompts, the mean over all their tokens.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        max_tokens: Most tokens of a response in evaluation.
        stop_strings: Texts that end a response, besides the end tokens.
        micro_tokens: Tokens of one forward pass, padding counted; None takes 2,048 on a CPU and 16,384 on a GPU.
        prompt: How prompts become tokens.
        evaluation: How responses are drawn for validation and test.
        reward_workers: Processes for rewards that take long; 0 computes them in this one, without a limit.
        reward_seconds: Limit of such a reward for one response.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    def __init__(
        self,
        backbone: str,
        max_tokens: int = 512,
        stop_strings: list[str] | None = None,
        micro_tokens: int | None = None,
        prompt: PromptConfig = PromptConfig(),  # noqa: B008  read only
        evaluation: EvaluationConfig = EvaluationConfig(),  # noqa: B008
        reward_workers: int = 2,
        reward_seconds: float = 5.0,
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(warmup_ratio=0.03),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(
            backbone, max_tokens, 1.0, tuple(stop_strings or ()), KV_TOKENS, prompt, evaluation, None,
            reward_workers, reward_seconds, loading, lora, quantization, optimizer, schedule, max_grad_norm,
        )  # fmt: skip
        self.save_hyperparameters()
        self.micro_tokens = micro_tokens

    def demonstration_collator(self) -> Callable[[list[Any]], ProblemBatch]:
        """Turns problems with solutions into a batch; called by the data module for training."""
        return DemonstrationCollator(self.policy.tokenizer, self.prompt)

    def batch_tokens(self, batch: ProblemBatch) -> int:
        """Tokens of a training batch, prompts counted, padding not."""
        return sum(map(len, batch.prompts)) + sum(map(len, batch.solutions))

    def forward(self, batch: ProblemBatch) -> Tensor:
        """Mean cross-entropy of a batch's solutions in nats a token, shape ``()``."""
        sequences = Sequences(batch.prompts, batch.solutions, range(len(batch)))
        budget = self.micro_tokens or (CPU_TOKENS if self.device.type == "cpu" else GPU_TOKENS)
        rows = list(range(len(batch)))
        chunks = sequences.chunks(rows, budget, self.device, "sorted", self.device_mesh is not None)
        states = torch.cat([self.policy.states(chunk) for chunk in chunks])
        labels = [token for chunk in chunks for row in chunk.rows for token in batch.solutions[row]]
        head = unwrap(self.policy.model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        bias = None if bias is None else full_tensor(bias)
        return cross_entropy(states, full_tensor(head.weight), torch.tensor(labels, device=self.device), bias)

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> Tensor:
        loss = self(batch) * share_of_mean(sum(map(len, batch.solutions)), self.device)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss
