"""An update written as loops over responses and tokens, from the logits of whole models in float64."""

import math
import random
import statistics
from collections.abc import Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import policy_worker as worker
import torch
from torch import Tensor

from lit_core.backbones import text_model
from lit_rl.methods.ppo import PPO
from lit_rl.modules.layout import Sequences
from lit_rl.modules.rollouts import Rollout

Chosen = set[tuple[int, int]]
Record = list[tuple[torch.nn.Parameter, Tensor, Tensor]]  # weights, their values before a step, their gradient


@dataclass
class Update:
    """What the reference needs: settings, models in float64 at the weights before the update, and the rollout."""

    module: Any  # only its settings are read
    policy: Any
    frozen: Any
    critic: Any  # a backbone, None without one
    head: Any  # the value head
    rollout: Rollout

    def __post_init__(self) -> None:
        self.config = self.module.loss
        self.rows = [row for row, response in enumerate(self.rollout.sequences.responses) if response]
        with torch.no_grad():
            self.old = {row: rolled(self.rollout, row) for row in self.rows}
            if self.config.importance is not None:
                engine, self.old = self.old, {row: floats(self.log_probs(self.policy, row)) for row in self.rows}
                self.weights = {row: self.importance(self.old[row], engine[row]) for row in self.rows}
            self.reference = {}
            if self.frozen is not None:
                self.reference = {row: floats(self.log_probs(self.frozen, row)) for row in self.rows}
            self.values = {row: floats(self.state_values(row)) for row in self.rows} if self.head else {}
        self.advantages, self.returns = self.estimate()

    # --- what the models say

    def ids(self, row: int) -> Tensor:
        return torch.tensor([[*self.rollout.sequences.prompts[row], *self.rollout.sequences.responses[row]]])

    def before(self, row: int, by_token: Tensor) -> Tensor:
        start = len(self.rollout.sequences.prompts[row]) - 1
        return by_token[0, start : start + len(self.rollout.sequences.responses[row])]

    def logits(self, model: Any, row: int) -> Tensor:
        return self.before(row, model(input_ids=self.ids(row)).logits) / self.module.temperature

    def log_probs(self, model: Any, row: int) -> Tensor:
        picked = torch.tensor(self.rollout.sequences.responses[row])
        return self.logits(model, row).log_softmax(-1).gather(1, picked[:, None]).squeeze(1)

    def state_values(self, row: int) -> Tensor:
        model = self.critic if self.critic is not None else text_model(self.policy)
        states = self.before(row, model(input_ids=self.ids(row)).last_hidden_state)
        return states @ self.head.linear.weight[0] + self.head.linear.bias[0]

    # --- what stays fixed

    def importance(self, old: list[float], engine: list[float]) -> list[float]:
        gaps = [one - other for one, other in zip(old, engine, strict=True)]
        level = self.config.importance
        if level == "sequence":
            gaps = [sum(gaps)] * len(gaps)
        elif level == "sequence_mean":
            gaps = [sum(gaps) / len(gaps)] * len(gaps)
        low, high = self.config.importance_low or 0.0, self.config.importance_high
        found = [math.exp(gap) for gap in gaps]
        if self.config.importance_how == "truncate":
            return [min(max(weight, low), high) for weight in found]
        return [weight if low <= weight <= high else 0.0 for weight in found]

    def estimate(self) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        """Advantages and, with a value function, returns of each token."""
        rewards = {row: [0.0] * len(self.old[row]) for row in self.rows}
        scores = self.rollout.scores.tolist()
        penalty = dict.fromkeys(range(len(scores)), 0.0)
        for row in self.rows:
            rewards[row][-1] += scores[row]
            if self.reference and self.config.kl_in == "reward":
                for step, (p, q) in enumerate(zip(self.old[row], self.reference[row], strict=True)):
                    lost = self.config.kl_coef * float(estimate_kl(torch.tensor(p - q), self.config.kl))
                    rewards[row][step] -= lost
                    penalty[row] += lost
        if self.head:
            return self.generalised(rewards)
        estimator = self.module.estimator
        if estimator == "reinforce_pp":
            sums = {row: to_go(rewards[row], self.module.discount) for row in self.rows}
            return whitened(sums), {}
        scores = [score - penalty[row] for row, score in enumerate(scores)]
        groups: dict[int, list[float]] = {}
        for group, score in zip(self.rollout.sequences.groups, scores, strict=True):
            groups.setdefault(group, []).append(score)
        found = {}
        for row in self.rows:
            members = groups[self.rollout.sequences.groups[row]]
            centred = scores[row] - statistics.fmean(members)
            if estimator == "rloo":
                centred = scores[row] - (sum(members) - scores[row]) / (len(members) - 1)
            elif estimator == "grpo" and self.module.scale != "none":
                spread = statistics.stdev(members if self.module.scale == "group" else scores)
                centred /= spread + self.module.epsilon
            found[row] = [centred] * len(self.old[row])
        return (whitened(found) if estimator == "reinforce_pp_baseline" else found), {}

    def generalised(self, rewards: dict[int, list[float]]) -> tuple[dict[int, list[float]], dict[int, list[float]]]:
        raw: dict[int, list[float]] = {}
        returns: dict[int, list[float]] = {}
        for row in self.rows:
            values, found = [*self.values[row], 0.0], [0.0] * (len(self.values[row]) + 1)
            for step in reversed(range(len(values) - 1)):
                error = rewards[row][step] + self.module.discount * values[step + 1] - values[step]
                found[step] = error + self.module.discount * self.module.decay * found[step + 1]
            raw[row] = found[:-1]
            returns[row] = [found[step] + values[step] for step in range(len(values) - 1)]
        return whitened(raw), returns

    # --- the loss of one optimizer step

    def loss(self, rows: Sequence[int], learned: Chosen | None = None, held: Chosen | None = None) -> Tensor:
        """Loss of some rows.

        Args:
            rows: The mini-batch.
            learned: Tokens ``(row, step)`` that the policy's loss is kept to: its mean is over them in forking, else
                over all.
            held: Tokens that are held near the old policy.
        """
        kept = [row for row in rows if row in self.rows]
        logits = {row: self.logits(self.policy, row) for row in kept}
        policy, kl, bonus = {}, {}, []
        for row in kept:
            log_probs = self.log_probs(self.policy, row)
            policy[row] = self.policy_terms(row, log_probs)
            for step, log_prob in enumerate(log_probs):
                if held is not None and (row, step) in held:
                    policy[row][step] = policy[row][step] + (log_prob - self.old[row][step]).abs()
            if learned is not None:
                steps = [step for step in range(len(log_probs)) if (row, step) in learned]
                if self.module.exploration.kind == "forking":
                    policy[row] = [policy[row][step] for step in steps]
                else:
                    policy[row] = [term if step in steps else term * 0 for step, term in enumerate(policy[row])]
            if self.reference and self.config.kl_in == "loss":
                pairs = zip(log_probs, self.reference[row], strict=True)
                kl[row] = [estimate_kl(p - q, self.config.kl) for p, q in pairs]
            bonus += [self.bonus(step) for step in logits[row]]
        total = self.reduced(policy, rows)
        if kl:
            total = total + self.config.kl_coef * self.reduced(kl, rows)
        if self.module.exploration.kind in ("entropy", "tre_k", "tre_p"):
            total = total - self.module.exploration.coefficient * sum(bonus) / len(bonus)
        if self.head:
            total = total + self.value_term(kept)
        return total

    def tokens(self, rows: Sequence[int]) -> list[tuple[tuple[int, int], float, float, float]]:
        """``(row, step)``, entropy, log-probability and advantage of each token, under the present weights."""
        found = []
        with torch.no_grad():
            for row in rows:
                if row not in self.rows:
                    continue
                logs = self.logits(self.policy, row).log_softmax(-1)
                for step, token in enumerate(self.rollout.sequences.responses[row]):
                    entropy = -float((logs[step].exp() * logs[step]).sum())
                    found.append(((row, step), entropy, float(logs[step, token]), self.advantages[row][step]))
        return found

    def policy_terms(self, row: int, log_probs: Tensor) -> list[Tensor]:
        gaps = [p - q for p, q in zip(log_probs, self.old[row], strict=True)]
        if self.config.ratio != "token":
            whole = sum(gaps, torch.zeros(())) / (len(gaps) if self.config.ratio == "sequence_mean" else 1)
            gaps = [whole] * len(gaps)
        low = self.config.clip_low
        high = low if self.config.clip_high is None else self.config.clip_high
        found = []
        for step, gap in enumerate(gaps):
            ratio, advantage = gap.exp(), self.advantages[row][step]
            value = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1 - low, 1 + high))
            if self.config.dual_clip is not None and advantage < 0:
                value = torch.minimum(value, torch.tensor(-advantage * self.config.dual_clip))
            found.append(value * (1.0 if self.config.importance is None else self.weights[row][step]))
        return found

    def reduced(self, terms: dict[int, list[Tensor]], rows: Sequence[int]) -> Tensor:
        everything = [term for row in terms for term in terms[row]]
        how = self.config.reduction
        if how == "token_mean":
            return torch.stack(everything).mean()
        if how == "const_norm":
            constant = self.config.constant or len(rows) * self.module.rollout.max_tokens
            return torch.stack(everything).sum() / constant
        sums = [
            sum(row, torch.zeros(())) / (max(1, len(row)) if how == "seq_mean_token_mean" else 1)
            for row in terms.values()
        ]
        return torch.stack(sums).mean()

    def bonus(self, logits: Tensor) -> Tensor:
        config = self.module.exploration
        best = logits.sort(descending=True).values
        count = len(best)
        if config.kind == "tre_k":
            count = config.top_k
        elif config.kind == "tre_p":
            reached = best.detach().softmax(-1).cumsum(0) >= config.top_p
            count = min(1 + int((~reached).sum()), config.cap)
        inside = best[:count].softmax(-1)
        value = -(inside * inside.log()).sum()
        if config.kind == "entropy" or config.scale == "none":
            return value
        return value * math.log(len(best)) / math.log(count) if count > 1 else value * 0

    def value_term(self, rows: Sequence[int]) -> Tensor:
        config, found = self.module.critic_config, []
        for row in rows:
            for step, value in enumerate(self.state_values(row)):
                target, old = self.returns[row][step], self.values[row][step]
                error = (value - target) ** 2
                if config.clip is not None:
                    error = torch.maximum(error, (value.clamp(old - config.clip, old + config.clip) - target) ** 2)
                found.append(error / 2)
        return config.coefficient * torch.stack(found).mean()


def estimate_kl(gap: Tensor, kind: str) -> Tensor:
    """``gap`` is the policy's log-probability minus the reference's."""
    if kind == "k1":
        return gap
    if kind == "k2":
        return gap**2 / 2
    value = (-gap).exp() - 1 + gap
    return value if kind == "k3" else gap**2 / 2 + (value - gap**2 / 2).detach()


def to_go(rewards: list[float], discount: float) -> list[float]:
    return [
        sum(discount ** (later - step) * rewards[later] for later in range(step, len(rewards)))
        for step in range(len(rewards))
    ]


def whitened(values: dict[int, list[float]]) -> dict[int, list[float]]:
    everything = [value for row in values.values() for value in row]
    mean, spread = statistics.fmean(everything), math.sqrt(statistics.variance(everything) + 1e-8)
    return {row: [(value - mean) / spread for value in found] for row, found in values.items()}


def rolled(rollout: Rollout, row: int) -> list[float]:
    return rollout.log_probs[row][rollout.mask[row]].double().tolist()


def floats(values: Tensor) -> list[float]:
    return values.tolist()


def rollout(branched: bool = False) -> Rollout:
    """Groups interleaved, an empty response and one of a single token; perhaps each goes on from its group's last."""
    draw = random.Random(0)
    groups, lengths = [0, 1, 2, 0, 1, 2, 0, 1, 2], [5, 3, 0, 1, 4, 6, 2, 5, 3]
    prompts = [[draw.randrange(1000) for _ in range(length)] for length in (4, 7, 2)]
    responses = [[draw.randrange(1000) for _ in range(length)] for length in lengths]
    for row in range(3, 9) if branched else ():
        taken = (min(lengths[row], lengths[row - 3]) + 1) // 2
        responses[row][:taken] = responses[row - 3][:taken]
    scores = [draw.choice([0.0, 0.5, 1.0]) for _ in groups]
    old = [[-6.9 + draw.uniform(-0.5, 0.5) for _ in range(length)] for length in lengths]  # far from the trainer's
    return worker.fixed_rollout(Sequences([prompts[group] for group in groups], responses, groups), scores, old)


def prepared(module: Any) -> Any:
    """A method whose policy is not its reference and whose values are not 0."""
    module.optimizer = worker.Recorder
    module.max_grad_norm = None
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return module


class Replay:
    """One update of a method, step by step beside the reference.

    Args:
        module: The method, as built.
        folder: Where the trainer may write.
    """

    def __init__(self, module: Any, folder: Path) -> None:
        self.module = prepared(module)
        self.rollout = rollout(branched=module.update.layout == "trie")
        models = {"policy": deepcopy(module.policy.model).double(), "frozen": None, "critic": None, "head": None}
        pairs = list(zip(module.policy.model.parameters(), models["policy"].parameters(), strict=True))
        if module.needs_reference:
            adapted = module.policy.adapted
            frozen = deepcopy(module.policy.model).unload() if adapted else deepcopy(module.policy.frozen)
            models["frozen"] = frozen.double()
        if isinstance(module, PPO):
            critic: Any = deepcopy(module.critic).double()
            pairs += zip(module.critic.parameters(), critic.parameters(), strict=True)
            separate = module.critic_config.kind == "separate"
            models |= {"critic": critic.model if separate else None, "head": critic.head if separate else critic}
        self.copies = {id(own): copy for own, copy in pairs}
        self.reference = Update(module, rollout=self.rollout, **models)
        self.run = worker.fit_fixed(module, self.rollout, folder)
        self.records: list[Record] = self.run.optimizers[0].records  # type: ignore[attr-defined]
        self.logged = {key: float(value) for key, value in self.run.callback_metrics.items()}

    def steps(self) -> Iterator[tuple[list[int], Record]]:
        """Rows of each optimizer step and what it did, with the reference at the weights before it."""
        assert len(self.records) == len(self.module.dealt)
        for rows, record in zip(self.module.dealt, self.records, strict=True):
            assert len(record) == sum(parameter.requires_grad for parameter in self.module.parameters())
            for own, before, _ in record:
                self.copies[id(own)].data.copy_(before)
                self.copies[id(own)].grad = None
            yield rows, record

    def check(self, record: Record, loss: Tensor) -> None:
        """Compare the gradients of a step with those of the reference's loss."""
        loss.backward()
        pairs = [(gradient.double(), self.copies[id(own)].grad) for own, _, gradient in record]
        pairs = [(found, torch.zeros_like(found) if wanted is None else wanted) for found, wanted in pairs]
        error = torch.cat([(found - wanted).flatten() for found, wanted in pairs]).norm()
        assert float(error) < 2e-6 * float(torch.cat([wanted.flatten() for _, wanted in pairs]).norm())
        for found, wanted in pairs:
            assert float((found - wanted).abs().max()) < 1e-6 + 1e-4 * float(wanted.abs().max())
