"""MGS: one policy for several domains, whose gradients are kept from undoing each other, module by module."""

from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects, summed
from lit_rl.functional.advantages import Scale, grpo_by_domain
from lit_rl.functional.interference import interference
from lit_rl.methods.grpo import GRPO, Estimator
from lit_rl.modules.config import (
    EvaluationConfig,
    ExplorationConfig,
    LossConfig,
    RolloutConfig,
    SurgeryConfig,
    UpdateConfig,
)
from lit_rl.modules.experience import Experience, Totals
from lit_rl.modules.exploration import Selection
from lit_rl.modules.granularity import KINDS
from lit_rl.modules.layout import Chunk
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.surgery import ConflictTable, GradientSurgery
from lit_rl.modules.surrogate import Denominators
from lit_rl.problems import PromptConfig

DOMAINS_KEY = "lit_rl_domains"


class MGS(GRPO):
    """GRPO on several domains with modular gradient surgery (arXiv 2602.02301).

    The loss is GRPO's on the mixed batch. Its gradient is formed domain by domain, with the denominators of the whole
    batch, so that the domains' gradients add up to GRPO's; in each module every domain's gradient is then projected off
    those that it conflicts with, and what is left is added up. A problem's ``domain`` says where it belongs.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        surgery: What a module is, and how gradients are combined.
        normalisation: Advantages are divided by the deviation of the rewards in their group (see ``scale``), or in
            their domain's part of the batch (the baseline Normalized Advantage).
        estimator: How rewards become advantages; see GRPO.
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
        max_grad_norm: The combined gradient is scaled down to this norm; None never.
    """

    def __init__(
        self,
        backbone: str,
        surgery: SurgeryConfig = SurgeryConfig(),  # noqa: B008  read only
        normalisation: Literal["group", "domain"] = "group",
        estimator: Estimator = "grpo",
        scale: Scale = "group",
        epsilon: float = 1e-6,
        unbiased: bool = True,
        discount: float = 1.0,
        rollout: RolloutConfig = RolloutConfig(temperature=0.7, max_tokens=4096),  # noqa: B008
        loss: LossConfig = LossConfig(  # noqa: B008
            reduction="seq_mean_token_mean", dual_clip=3.0, kl_coef=0.001
        ),
        update: UpdateConfig = UpdateConfig(),  # noqa: B008
        exploration: ExplorationConfig = ExplorationConfig(kind="entropy", coefficient=0.001),  # noqa: B008
        prompt: PromptConfig = PromptConfig(max_tokens=896),  # noqa: B008
        evaluation: EvaluationConfig = EvaluationConfig(temperature=0.7, top_p=0.95),  # noqa: B008
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
            backbone, estimator, scale, epsilon, unbiased, discount, rollout, loss, update, exploration, prompt,
            evaluation, reward_model, reward_workers, reward_seconds, loading, lora, quantization, optimizer, schedule,
            max_grad_norm,
        )  # fmt: skip
        self.save_hyperparameters()
        if normalisation == "domain" and estimator != "grpo":
            raise InputError(f"is a way of GRPO's estimator, not of {estimator}", field="normalisation")
        if surgery.weighting == "per_domain_mean" and loss.reduction == "const_norm" and loss.constant is not None:
            raise InputError("a fixed constant has no mean over a domain", field="loss.constant")
        self.surgery, self.normalisation = surgery, normalisation
        self.domains: tuple[str, ...] = tuple(surgery.domains)  # in the order in which gradients are kept
        self.interference: ConflictTable | None = None  # of the last optimizer step
        self._engine: GradientSurgery | None = None
        self._cosines: Tensor | None = None  # of gradvac, from a checkpoint
        self._told = False

    def advantages(self, rollout: Rollout, experience: Experience, penalties: Tensor | None) -> None:
        experience.domains = [problem.domain for problem in rollout.problems]
        self._meet(experience.domains)
        if self.normalisation == "group":
            super().advantages(rollout, experience, penalties)
            return
        mask, scores = rollout.mask, rollout.scores
        if penalties is not None:  # of the whole response
            scores = scores - torch.where(mask, penalties, 0.0).sum(1)
        ids = self._domain_ids(experience.domains)
        experience.advantages = grpo_by_domain(
            scores, rollout.group_ids, ids, len(self.domains), mask, self.epsilon, summed
        )

    def form_gradient(self, experience: Experience, rows: list[int], totals: Totals, seed: int) -> Tensor:
        """Backward passes domain by domain, and surgery; of a single domain as GRPO does it."""
        if len(self.domains) < 2:
            return super().form_gradient(experience, rows, totals, seed)
        engine = self._ready_engine()
        read = self._with_gradient(experience, rows)
        members = {name: [row for row in read if experience.domains[row] == name] for name in self.domains}
        plan = {
            name: self.passes.chunks(experience.sequences, mine, self.device, spare=rows[0])
            for name, mine in members.items()
        }
        selection = self._select(experience, rows, seed)
        scales = self._scales(experience, rows, plan, selection)
        engine.gradients.check_in_step([name for name, chunks in plan.items() for _ in chunks])
        whole = torch.zeros((), device=self.device)
        with self.no_sync():
            for name, chunks in plan.items():
                for chunk in chunks:
                    with engine.gradients.record(name):
                        whole += self._backward(chunk, experience, scales[name], selection, totals, seed)
        engine.finish(seed)
        self._measure(engine, totals)
        return whole

    def _scales(
        self, experience: Experience, rows: list[int], plan: dict[str, list[Chunk]], selection: Selection | None
    ) -> dict[str, Denominators]:
        """What each domain's losses are divided by."""
        if self.surgery.weighting == "share":
            everything = [chunk for chunks in plan.values() for chunk in chunks]
            scale = self.surrogate.denominators(experience, rows, everything, selection, self.update_constant(rows))
            return dict.fromkeys(plan, scale)
        ids = self._domain_ids([experience.domains[row] for row in rows])
        counts = summed(torch.bincount(ids, minlength=len(self.domains)).float()).tolist()
        found = {}
        for name, count in zip(self.domains, counts, strict=True):
            if not count:  # on no rank
                continue
            own = [row for row in rows if experience.domains[row] == name]
            chosen = None
            if selection is not None:
                inside = torch.zeros(len(experience.mask), 1, dtype=torch.bool, device=self.device)
                inside[torch.tensor(own, dtype=torch.long, device=self.device)] = True
                chosen = Selection(selection.learned & inside, selection.held)
            scale = self.surrogate.denominators(experience, own, plan[name], chosen, self.update_constant(own))
            share = sum(map(bool, counts))
            found[name] = Denominators(share * scale.policy, share * scale.divergence, share * scale.tokens)
        return found

    def _meet(self, names: list[str]) -> None:
        """Get to know the domains of a batch, in the same order on all ranks."""
        new = sorted(set[str]().union(*gather_objects(set(names))) - set(self.domains))
        if new and self.surgery.domains:
            raise InputError(f"does not list the domain '{new[0]}' of the problems", field="surgery.domains")
        self.domains += tuple(new)
        if len(self.domains) < 2 and not self._told:
            self._told = True
            rank_zero_warn(f"all problems are of one domain, '{self.domains[0]}': nothing to operate on, this is GRPO")

    def _ready_engine(self) -> GradientSurgery:
        if self._engine is None or self._engine.gradients.domains != self.domains:
            config, before = self.surgery, self._engine
            self._engine = GradientSurgery(
                self.policy, self.domains, config.granularity, config.method, config.compat, config.order,
                config.radius, config.decay,
            )  # fmt: skip
            means = self._cosines if before is None else before.cosines
            if means is not None:  # a domain that came up later starts at 0
                more = len(self.domains) - means.shape[-1]
                self._engine.cosines = torch.nn.functional.pad(means, (0, more, 0, more)).to(self.device)
        return self._engine

    def _domain_ids(self, names: list[str]) -> Tensor:
        places = {name: number for number, name in enumerate(self.domains)}
        return torch.tensor([places[name] for name in names], dtype=torch.long, device=self.device)

    def _measure(self, engine: GradientSurgery, totals: Totals) -> None:
        """Log interference of the whole model and of its kinds of modules, and keep the table of all modules."""
        gram, weights, parts = engine.gram, engine.weights, engine.split.parts
        assert gram is not None  # of the step before
        assert weights is not None
        sizes = torch.tensor([part.size for part in parts], device=gram.device)
        found = interference(gram, weights, sizes)
        norms = gram.sum(0).diagonal().clamp(min=0).sqrt()
        for name in ("cosine", "conflict_ratio", "conflict_ratio_weighted", "magnitude"):
            totals.add(f"surgery/{name}", getattr(found, name))
        for number, domain in enumerate(self.domains):
            totals.add(f"surgery/gain/{domain}", found.gains[number])
            totals.add(f"surgery/norm/{domain}", norms[number])
            for other in range(number):
                totals.add(f"surgery/cosine/{self.domains[other]}-{domain}", found.cosines[other, number])
        for kind in KINDS:
            members = [number for number, part in enumerate(parts) if part.kind == kind]
            if members and len(members) < len(parts):
                index = torch.tensor(members, device=gram.device)
                among = interference(gram[index], weights[index], sizes[index])
                for name in ("cosine", "conflict_ratio", "magnitude"):
                    totals.add(f"surgery/{name}/{kind}", getattr(among, name))
        self.interference = engine.table()

    def _log_rollout(self, drawn: Rollout, seconds: float) -> None:
        super()._log_rollout(drawn, seconds)
        if len(self.domains) < 2:
            return
        ids = self._domain_ids([problem.domain for problem in drawn.problems])
        rewards = torch.tensor(drawn.rewards, device=self.device)
        lengths = drawn.mask.sum(1).float()
        surprise = torch.where(drawn.mask, -drawn.log_probs, 0.0).sum(1)
        values = torch.stack([torch.ones_like(rewards), rewards, lengths, surprise], 1)
        sums = summed(torch.zeros(len(self.domains), 4, device=self.device).index_add(0, ids, values))
        for name, (count, reward, tokens, bits) in zip(self.domains, sums.tolist(), strict=True):
            if count:
                self.log(f"rollout/{name}/share", count / sum(sums[:, 0].tolist()))
                self.log(f"rollout/{name}/reward_mean", reward / count)
                self.log(f"rollout/{name}/length_mean", tokens / count)
                self.log(f"rollout/{name}/entropy", bits / max(tokens, 1.0))  # an estimate, in nats a token

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        means = self._cosines if self._engine is None else self._engine.cosines
        checkpoint[DOMAINS_KEY] = {"domains": list(self.domains), "cosines": None if means is None else means.cpu()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if DOMAINS_KEY in checkpoint:
            self.domains = tuple(checkpoint[DOMAINS_KEY]["domains"])
            self._cosines, self._engine = checkpoint[DOMAINS_KEY]["cosines"], None
