"""The loop of all policy-gradient methods: draw, score, estimate advantages, update.

``training_step`` gets problems. It draws responses from the live weights, so that no loader can make them stale, and
takes its optimizer steps by itself; the trainer's ``global_step`` counts batches of responses learned from, whatever
the number of mini-batches, so that ``max_steps``, checkpoints and curves mean what they say. Random draws are functions
of the seed and of that count, so that a resumed run repeats them.
"""

import time
from collections.abc import Iterable
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torch.optim import Optimizer

from lit_core.backbones import BackboneConfig, Lora, Quantization, unwrap
from lit_core.errors import InputError
from lit_core.optim import Schedule, build_schedule, clip_gradients, parameter_groups
from lit_core.samplers import mix_seed
from lit_core.sharding import average_gradients, gather_objects, row_counts, summed, world_size
from lit_rl.functional.losses import adapted_coefficient, divergence, importance_weights
from lit_rl.functional.masking import masked_mean
from lit_rl.methods.policy_method import PolicyMethod
from lit_rl.modules.config import EvaluationConfig, ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.experience import Experience, Totals, deal_groups
from lit_rl.modules.exploration import Exploration, Selection
from lit_rl.modules.layout import Chunk
from lit_rl.modules.passes import Passes
from lit_rl.modules.rollouts import Rollout, collect, informative, joined, renumbered
from lit_rl.modules.steps import count_step, step_uncounted
from lit_rl.modules.surrogate import Surrogate
from lit_rl.problems import ProblemBatch, PromptConfig

STATE_KEY = "lit_rl_state"
WAITING_KEY = "lit_rl_waiting"
HOPELESS = 20  # updates without a single group whose rewards differ, after which the user is told


class PolicyGradient(PolicyMethod):
    """Base of PPO, GRPO and what is built on them.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
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
        rollout: RolloutConfig,
        loss: LossConfig,
        update: UpdateConfig,
        exploration: ExplorationConfig,
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
        stops = tuple(rollout.stop_strings)
        super().__init__(
            backbone, rollout.max_tokens, rollout.temperature, stops, rollout.kv_tokens, prompt, evaluation,
            reward_model, reward_workers, reward_seconds, loading, lora, quantization, optimizer, schedule,
            max_grad_norm,
        )  # fmt: skip
        self.rollout, self.loss, self.update, self.exploration = rollout, loss, update, exploration
        self.automatic_optimization = False
        self.latest: Rollout | None = None  # for callbacks that show samples
        self.waiting: list[Rollout] = []  # informative groups that do not fill a batch yet
        self.draws = 0  # batches drawn so far, over all updates
        self.draws_waiting = 0
        self.skipped = 0  # updates left out because something was not finite
        self.dull = 0  # updates in a row without any signal
        self.kl_coef, self.entropy_coef = loss.kl_coef, exploration.coefficient
        self.tokens_read = 0
        self.tokens_drawn = 0  # so far, by all ranks

    @property
    def needs_reference(self) -> bool:
        """Whether the starting weights are kept beside those in training."""
        return self.loss.kl_coef > 0

    def configure_model(self) -> None:
        super().configure_model()
        if self.update.layout in ("shared", "trie") and not self.policy.shares_prompts:
            raise InputError("this backbone, or its attention, cannot share prompts or prefixes", field="update.layout")
        self.term = Exploration(self.exploration, int(unwrap(self.policy.model).config.vocab_size))
        self.surrogate = Surrogate(self.loss, self.term)
        sharded = self.device_mesh is not None
        self.passes = Passes(self.policy, self.update.micro_tokens, self.update.layout, sharded)

    def advantages(self, rollout: Rollout, experience: Experience, penalties: Tensor | None) -> None:
        """Fill in the advantages of a batch, and returns where there is a value function.

        Args:
            rollout: Responses, scores and groups.
            experience: To be completed.
            penalties: What the divergence takes off each token's reward ``(B, T)``; None where it is in the loss.
        """
        raise NotImplementedError

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        started = time.perf_counter()
        drawn = self._draw(batch)
        if drawn is None:
            return
        rewarded = time.perf_counter()
        totals = Totals(self.device)
        experience = self._experience(drawn, totals)
        self._learn(experience, totals)
        self._log_rollout(drawn, rewarded - started)
        update = time.perf_counter() - rewarded
        self.log("time/update_s", update)
        self.log("time/update_tokens_per_s", float(experience.mask.sum()) / update)
        means = totals.means(summed)
        self.log_dict(means)
        if self.exploration.kind == "adaptive_entropy" and "policy/full_entropy" in means:
            self.entropy_coef = self.term.adapted(self.entropy_coef, float(means["policy/full_entropy"]))
            self.log("policy/entropy_coef", self.entropy_coef)
        self.log("train/skipped_steps", float(self.skipped))
        self._count_step()

    def collect(self, batch: ProblemBatch, seed: int, first_group: int) -> Rollout:
        """Draw and score responses; each problem's are a group, numbered from ``first_group`` on."""
        return collect(self.policy, batch, self.rollout, seed, self.scorer, self.device, first_group)

    def _draw(self, batch: ProblemBatch) -> Rollout | None:
        """Responses to learn from, or None where more have to be drawn first (dynamic sampling)."""
        config = self.rollout
        seed = mix_seed(self.loading.seed, self.draws)
        held = sum(len(part) for part in self.waiting) // config.samples
        drawn = self.collect(batch, seed, held)
        self.draws += 1
        self.tokens_drawn += int(summed(torch.tensor(float(drawn.new_tokens), device=self.device)))
        self.draws_waiting += 1
        self.tokens_read = drawn.new_tokens
        self.latest = drawn
        rows = informative(drawn)
        total = summed(torch.tensor([float(len(rows)), float(len(drawn))], device=self.device))
        self.log("rollout/all_equal", 1 - total[0] / total[1])
        signal = bool(total[0] > 0)
        if config.samples == 1:  # there are no groups: the batch is what a reward is compared with
            signal = len(set[float]().union(*gather_objects(set(drawn.rewards)))) > 1
        self._warn_if_dull(signal)
        if not config.dynamic:
            return drawn
        if rows:
            self.waiting.append(renumbered(drawn.take(rows), held))
        full = len(batch) * config.samples
        ready = all(gather_objects(sum(len(part) for part in self.waiting) >= full))
        if not ready and self.draws_waiting < config.most_draws:
            return None
        some = all(gather_objects(bool(self.waiting)))
        whole = joined(self.waiting) if some else drawn
        self.log("rollout/draws", float(self.draws_waiting))
        self.waiting, self.draws_waiting = [], 0
        return whole.take(range(min(full, len(whole))))

    def _experience(self, rollout: Rollout, totals: Totals) -> Experience:
        """Everything that stays fixed during the update."""
        mask, sequences = rollout.mask, rollout.sequences
        old = rollout.log_probs
        recompute = self.rollout.recompute_log_probs
        if recompute is None:
            recompute = self.policy_dtype != torch.float32 or self.trainer.precision != "32-true"
        if recompute or self.loss.importance is not None:
            old = self.passes.log_probs(sequences, rollout.responses, mask)
            totals.add("rollout/log_prob_gap", (old - rollout.log_probs).abs(), mask)
        experience = Experience(sequences, rollout.responses, mask, old, torch.zeros_like(old))
        if self.loss.importance is not None:
            experience.weights = importance_weights(
                old, rollout.log_probs, mask, self.loss.importance, self.loss.importance_how,
                self.loss.importance_high, self.loss.importance_low,
            )  # fmt: skip
        totals.add("policy/entropy", -old, mask)  # an estimate: the mean of -log p over sampled tokens
        penalties = None
        if self.needs_reference:
            experience.reference_log_probs = self.passes.reference_log_probs(sequences, rollout.responses, mask)
            kl = divergence(old, experience.reference_log_probs, self.loss.kl)
            mean = masked_mean(kl, mask, summed)
            totals.add("policy/kl", kl, mask)
            if self.loss.kl_in == "reward":
                penalties = self.kl_coef * kl
            self._adapt_kl(float(mean), sum(row_counts(len(rollout), self.device)))
        self.advantages(rollout, experience, penalties)
        return experience

    def _learn(self, experience: Experience, totals: Totals) -> None:
        """Epochs of mini-batches, an optimizer step each; ranks take equally many, also where one has fewer groups."""
        groups = min(row_counts(len(set(experience.sequences.groups)), self.device))
        count = min(self.update.mini_batches, groups)
        for epoch in range(self.update.epochs):
            parts = (self.loading.seed, self.global_step, epoch)
            for number, rows in enumerate(deal_groups(experience.sequences, count, *parts)):
                self._step(experience, rows, totals, mix_seed(*parts, number))

    def _step(self, experience: Experience, rows: list[int], totals: Totals, seed: int) -> None:
        """One optimizer step on a mini-batch, in micro-batches that give the gradient of the whole."""
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        optimizer.zero_grad()
        totals.add("policy/loss", self.form_gradient(experience, rows, totals, seed))
        for parameter in self.resting():
            parameter.grad = None
        norms = [clip_gradients(parameters, self.max_grad_norm) for parameters in self.clipped_apart()]
        totals.add("policy/grad_norm", norms[0])
        finite = all(bool(norm.isfinite()) for norm in norms)  # the same on every rank, as the norms are
        if not finite:
            self.skipped += 1
            rank_zero_warn(f"update {self.global_step} was left out: its gradient is not finite")
        if not finite or not any(bool(norm) for norm in norms):
            optimizer.zero_grad()  # then the step changes nothing: neither momentum nor decay
        step_uncounted(optimizer)
        optimizer.zero_grad()

    def form_gradient(self, experience: Experience, rows: list[int], totals: Totals, seed: int) -> Tensor:
        """Leave the gradient of a mini-batch in ``p.grad``, the same on all ranks.

        Returns:
            This rank's part of the loss, of which the mean over the ranks is the loss, shape ``()``.
        """
        chunks = self.passes.chunks(experience.sequences, self._with_gradient(experience, rows), self.device)
        selection = self._select(experience, rows, seed)
        scale = self.surrogate.denominators(experience, rows, chunks, selection, self.update_constant(rows))
        whole = torch.zeros((), device=self.device)
        with self.no_sync():  # ranks may have different numbers of chunks
            for chunk in chunks:
                whole += self._backward(chunk, experience, scale, selection, totals, seed)
        average_gradients(self.parameters())
        return whole

    def _select(self, experience: Experience, rows: list[int], seed: int) -> Selection | None:
        """Tokens that the exploration term chooses over the whole mini-batch, if it does so."""
        if not self.term.selects or self.exploration.scope != "batch":
            return None
        return self.passes.select(self.term, experience, rows, seed)

    def _backward(
        self, chunk: Chunk, experience: Experience, scale: Any, selection: Any, totals: Totals, seed: int
    ) -> Tensor:
        """Backward pass of a micro-batch; a rank's gradient is that of its share of the loss, their mean is taken."""
        loss = world_size() * self.chunk_loss(chunk, experience, scale, selection, totals, seed)
        self.manual_backward(loss)
        return loss.detach()

    def chunk_loss(
        self,
        chunk: Chunk,
        experience: Experience,
        scale: Any,
        selection: Any,
        totals: Totals,
        seed: int,
    ) -> Tensor:
        """Loss of a micro-batch, its share of the mini-batch's."""
        states = self.policy.states(chunk)
        return self.surrogate.loss(
            self.policy, states, chunk, experience, scale, selection, totals, seed, self.kl_coef, self.entropy_coef
        )

    def learns_from_all(self) -> bool:
        """Whether responses without an advantage have a gradient too."""
        term = self.exploration.kind
        return term not in ("none", "clip_higher") or (self.loss.kl_coef > 0 and self.loss.kl_in == "loss")

    def _with_gradient(self, experience: Experience, rows: list[int]) -> list[int]:
        """Rows that an update has to read: those of groups whose rewards are all equal have no gradient, mostly."""
        if self.learns_from_all() or self.device_mesh is not None:  # sharded ranks read equally many chunks
            return rows
        needed = experience.advantages[torch.tensor(rows, device=self.device)].any(1).tolist()
        return [row for row, some in zip(rows, needed, strict=True) if some]

    def resting(self) -> Iterable[torch.nn.Parameter]:
        """Parameters that this update leaves as they are."""
        return ()

    def clipped_apart(self) -> list[list[torch.nn.Parameter]]:
        """Parameters whose gradients are clipped together, the policy's first."""
        return [[parameter for parameter in self.policy.parameters() if parameter.requires_grad]]

    def update_constant(self, rows: list[int]) -> float:
        """Divisor of ``const_norm``: by default what full responses of the whole mini-batch would have in tokens."""
        return self.loss.constant or float(sum(row_counts(len(rows), self.device)) * self.rollout.max_tokens)

    @property
    def policy_dtype(self) -> torch.dtype:
        """Type of the policy's weights."""
        return next(self.policy.model.parameters()).dtype

    def _adapt_kl(self, kl: float, samples: int) -> None:
        if self.loss.kl_target is not None:
            self.kl_coef = adapted_coefficient(self.kl_coef, kl, self.loss.kl_target, samples, self.loss.kl_horizon)
            self.log("policy/kl_coef", self.kl_coef)

    def _warn_if_dull(self, signal: bool) -> None:
        self.dull = 0 if signal else self.dull + 1
        if self.dull == HOPELESS:
            rank_zero_warn(
                f"in {HOPELESS} batches the rewards of every group were all equal: there is nothing to learn from. "
                "A policy that never succeeds needs a warm start (python -m experiments.sft)."
            )

    def _log_rollout(self, drawn: Rollout, seconds: float) -> None:
        lengths = drawn.mask.sum(1).float()
        rewards = torch.tensor(drawn.rewards, device=self.device)
        count, total = summed(torch.stack([torch.ones_like(rewards).sum(), rewards.sum()]))
        variance = summed((rewards - total / count).square().sum()) / count
        self.log("rollout/reward_mean", total / count, prog_bar=True)
        self.log("rollout/reward_std", variance.sqrt())
        self.log("rollout/length_mean", lengths.mean(), sync_dist=True)
        self.log("rollout/length_max", lengths.max(), reduce_fx="max", sync_dist=True)
        self.log("rollout/truncated", drawn.truncated.float().mean(), sync_dist=True)
        self.log("rollout/tokens_total", float(self.tokens_drawn))
        self.log("time/rollout_s", seconds)
        self.log("time/rollout_tokens_per_s", self.tokens_read / seconds)

    def _count_step(self) -> None:
        """Count one step for the trainer, and move the learning rate on."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer)
        count_step(optimizer)
        scheduler.step()  # type: ignore[union-attr]
        self._keep_to_budget()

    def _keep_to_budget(self) -> None:
        budget = self.rollout.token_budget
        if budget is not None and self.tokens_drawn >= budget:
            self.trainer.should_stop = True

    def on_train_start(self) -> None:
        super().on_train_start()
        self._keep_to_budget()  # a fit that goes on may have drawn enough

    def batch_tokens(self, batch: ProblemBatch) -> int:
        """Tokens of the responses that were drawn for a batch."""
        return self.tokens_read

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Clipping happens before the step is decided on."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(self.optimizer_groups())
        schedule = build_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Parameter groups of the one optimizer."""
        return parameter_groups(self.policy)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        names = ("draws", "draws_waiting", "tokens_drawn", "skipped", "dull", "kl_coef", "entropy_coef")
        checkpoint[STATE_KEY] = {name: getattr(self, name) for name in names}
        if self.rollout.dynamic:
            checkpoint[WAITING_KEY] = gather_objects([part.state() for part in self.waiting])  # of each rank

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name, value in checkpoint.get(STATE_KEY, {}).items():
            setattr(self, name, value)
        waiting = checkpoint.get(WAITING_KEY, [])
        if len(waiting) == world_size():  # another number of ranks draws other problems
            self.waiting = [Rollout.from_state(state, self.device) for state in waiting[self.global_rank]]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        precision = str(self.trainer.precision)
        if precision == "16-mixed":
            raise InputError("16-mixed scales gradients, which are checked and clipped here; use bf16-mixed")
        if precision in ("16-true", "bf16-true"):
            raise InputError(f"{precision} would keep log-probabilities in 16 bits; use 32-true and loading.dtype")
