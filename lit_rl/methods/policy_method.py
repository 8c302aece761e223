"""What every method that trains a policy shares: the backbone, prompts, evaluation by sampling, export."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning.pytorch.cli import OptimizerCallable

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.export import new_folder, save_model
from lit_core.generation import SamplingParams
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects
from lit_rl.modules.config import EvaluationConfig
from lit_rl.modules.evaluation import DistributionHook, ProblemResult, merged, problem_results, tensor_metrics
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import draw, response_text
from lit_rl.modules.scoring import Scorer
from lit_rl.problems import ProblemBatch, PromptCollator, PromptConfig

EVALUATION_SEED = 7_001  # the same draws at every evaluation: differences are the policy's


class PolicyMethod(Method):
    """Base of methods that train a policy.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        max_tokens: Most tokens of a response.
        temperature: Of the policy in training.
        stop_strings: Texts that end a response, besides the end tokens.
        kv_tokens: Most tokens that the engine's cache holds.
        prompt: How prompts become tokens.
        evaluation: How responses are drawn for validation and test.
        reward_model: Folder or hub id of a reward model, for the task ``preference``.
        reward_workers: Processes for rewards that take long; 0 computes them in this one, without a limit.
        reward_seconds: Limit of such a reward for one response.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    policy: Policy

    def __init__(
        self,
        backbone: str,
        max_tokens: int,
        temperature: float,
        stop_strings: tuple[str, ...],
        kv_tokens: int,
        prompt: PromptConfig,
        evaluation: EvaluationConfig,
        reward_model: str | None,
        reward_workers: int,
        reward_seconds: float,
        loading: BackboneConfig,
        lora: Lora,
        quantization: Quantization | None,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(optimizer, schedule, max_grad_norm)
        self.backbone, self.loading, self.lora, self.quantization = backbone, loading, lora, quantization
        self.max_tokens, self.temperature, self.stop_strings = max_tokens, temperature, stop_strings
        self.kv_tokens, self.prompt, self.evaluation = kv_tokens, prompt, evaluation
        self.reward_model = reward_model
        self.strict_loading = quantization is None  # quantised layers are not read back from a checkpoint
        judge = self._judge if reward_model else None
        self.scorer = Scorer(reward_workers, reward_seconds, judge, prompt.answer_tag)
        self.results: list[ProblemResult] = []
        self._collected: list[ProblemResult] = []
        self._judging: Any = None

    @property
    def needs_reference(self) -> bool:
        """Whether the starting weights are kept beside those in training."""
        return False

    def configure_model(self) -> None:
        if "policy" in dict(self.named_children()):
            return
        self.policy = Policy(
            self.backbone, self.loading, self.lora, self.quantization, self.temperature, self.needs_reference
        )
        if self.device_mesh is not None:
            self.policy.shard(self.device_mesh)

    def prompt_collator(self) -> Callable[[list[Any]], ProblemBatch]:
        """Turns problems into a batch; called by the data module."""
        return PromptCollator(self.policy.tokenizer, self.prompt)

    def teardown(self, stage: str) -> None:
        self.scorer.close()

    def validation_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        self._collected += self.respond(batch)

    def on_validation_epoch_end(self) -> None:
        self._report("val")

    def test_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        self._collected += self.respond(batch)

    def on_test_epoch_end(self) -> None:
        self._report("test")

    def predict_step(self, batch: ProblemBatch, batch_idx: int) -> list[ProblemResult]:
        return self.respond(batch)

    def respond(self, batch: ProblemBatch) -> list[ProblemResult]:
        """Draw responses as for evaluation, and score them."""
        config = self.evaluation
        params = SamplingParams(
            config.temperature, config.top_p, None, self.max_tokens, self.policy.end_ids, self.stop_strings
        )
        hook = DistributionHook(config, self.temperature)
        completions = draw(self.policy, batch, params, config.samples, EVALUATION_SEED, self.kv_tokens, hook)
        texts = [response_text(self.policy, completion.tokens) for completion in completions]
        rewards = self.scorer.rewards([p for p in batch.problems for _ in range(config.samples)], texts)
        return problem_results(batch.problems, completions, texts, rewards, self.scorer.answers(texts))

    def _report(self, split: str) -> None:
        self.results = merged(gather_objects(self._collected))
        self._collected = []
        if self.results:
            metrics = tensor_metrics(self.results, split)
            self.log_dict(dict(metrics))
            self.log(f"{split}/score", metrics[f"{split}/reward"], prog_bar=True, logger=False)

    def _judge(self, dialogues: Any) -> list[float]:
        if self._judging is None:
            from lit_rl.modules.reward_model import RewardModel

            assert self.reward_model is not None  # the scorer has no judge otherwise
            self._judging = [RewardModel.load(self.reward_model).to(self.device)]  # a list: not a part of this module
        return self._judging[0].scores(dialogues, progress=False).tolist()

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a folder for ``AutoModelForCausalLM``."""
        with new_folder(output) as folder:
            save_model(self.policy.model, folder, form, self.backbone, output)
            self.policy.tokenizer.save_pretrained(folder)
