"""The gradient study: a contextual bandit with several domains, small enough for many seeds at once.

A policy of two hidden layers chooses one of a few actions in a context. A domain has contexts around a centre of its
own, and a right action for each of them, given by a random linear map that the domains share in part. The gradients of
a step are those of policy gradients, with the mean reward of a context's samples as baseline. All seeds are trained at
once, as one more dimension of every weight, and all ways to combine gradients see the same contexts and the same noise,
so that they can be compared seed by seed.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from lit_core.samplers import mix_seed
from lit_rl.functional.surgery import draw_orders, surgery_weights

BanditGranularity = Literal["param", "linear", "global"]
MODULES: dict[str, list[int]] = {  # of the weights and biases of three layers
    "param": [0, 1, 2, 3, 4, 5],
    "linear": [0, 0, 1, 1, 2, 2],
    "global": [0, 0, 0, 0, 0, 0],
}


@dataclass(frozen=True)
class BanditConfig:
    """Problem and training.

    Args:
        domains: How many.
        inputs: Size of a context.
        hidden: Width of both hidden layers.
        actions: How many.
        contexts: Of each domain and step.
        samples: Actions drawn in each context.
        distance: Norm of the domains' centres; contexts have unit variance in each direction.
        shared: Cosine between the maps of two domains, in expectation.
        told: Whether the policy reads the number of the domain beside the context.
        lr: Of Adam.
        early: Steps after which it is evaluated first.
        late: All steps.
        every: Steps between two points of the curve; divides ``early`` and ``late``.
        held_out: Contexts of each domain that it is evaluated in.
    """

    domains: int = 3
    inputs: int = 16
    hidden: int = 32
    actions: int = 8
    contexts: int = 16
    samples: int = 8
    distance: float = 2.0
    shared: float = 0.3
    told: bool = False
    lr: float = 3e-3
    early: int = 200
    late: int = 600
    every: int = 20
    held_out: int = 256


@dataclass(frozen=True)
class BanditResult:
    """What came out, by seed.

    Args:
        curve: Steps of the curve.
        values: Expected reward in each domain at those steps, ``(steps, S, T)``.
        conflicts: Share of (pair of domains, module, step) whose gradients conflict, ``(S,)``.
        hidden: Among the (pair, step) whose gradients agree as a whole, the share that conflicts in a module, ``(S,)``.
    """

    curve: list[int]
    values: Tensor
    conflicts: Tensor
    hidden: Tensor

    def at(self, step: int) -> Tensor:
        """Expected reward after a step of the curve, ``(S, T)``."""
        return self.values[self.curve.index(step)]


class Bandit:
    """Problems, one for each seed.

    Args:
        config: Their shape.
        seeds: Seeds of the problems, first weights, contexts and draws.
    """

    def __init__(self, config: BanditConfig, seeds: Sequence[int]) -> None:
        self.config, self.seeds = config, list(seeds)
        shape, count = (config.domains, config.actions, config.inputs), len(self.seeds)
        generators = [torch.Generator().manual_seed(mix_seed(seed, 0)) for seed in self.seeds]
        own, common, centres = (
            torch.stack([torch.randn(size, generator=g) for g in generators])
            for size in (shape, shape[1:], (config.domains, config.inputs))
        )
        self.maps = math.sqrt(1 - config.shared) * own + math.sqrt(config.shared) * common[:, None]
        self.centres = config.distance * torch.nn.functional.normalize(centres, dim=2)
        self.width = config.inputs + (config.domains if config.told else 0)
        sizes = [self.width, config.hidden, config.hidden, config.actions]
        self.first_weights: list[Tensor] = []
        for fan_in, fan_out in pairwise(sizes):
            matrix = torch.stack([torch.randn(fan_in, fan_out, generator=g) for g in generators]) / math.sqrt(fan_in)
            self.first_weights += [matrix, torch.zeros(count, 1, fan_out)]
        self.held_out = self.contexts(config.held_out, -1)

    def contexts(self, count: int, step: int) -> Tensor:
        """Contexts of a step, ``(S, T, count, width)``; the domain stands behind where the policy is told."""
        shape = (self.config.domains, count, self.config.inputs)
        drawn = torch.stack([torch.randn(shape, generator=g) for g in self._generators(1, step)])
        points = drawn + self.centres[:, :, None]
        if not self.config.told:
            return points
        names = torch.eye(self.config.domains)[:, None].expand(-1, count, -1)
        return torch.cat([points, names.expand(len(points), -1, -1, -1)], 3)

    def right(self, contexts: Tensor) -> Tensor:
        """The right action in each context, ``(S, T, count)``."""
        points = contexts[..., : self.config.inputs] - self.centres[:, :, None]
        return (points @ self.maps.transpose(2, 3)).argmax(3)

    def log_policy(self, weights: Sequence[Tensor], contexts: Tensor) -> Tensor:
        """Log-probabilities of the actions, ``(S, T, count, A)``."""
        states = contexts.flatten(1, 2)
        for number in range(0, len(weights), 2):
            states = torch.baddbmm(weights[number + 1], states, weights[number])
            states = states.tanh() if number < len(weights) - 2 else states
        return states.log_softmax(2).view(*contexts.shape[:3], -1)

    def gradients(self, weights: Sequence[Tensor], step: int) -> list[Tensor]:
        """Of every weight the gradients of the domains' losses, ``(T, S, ...)``; a domain counts by its share."""
        config = self.config
        contexts = self.contexts(config.contexts, step)
        log_policy = self.log_policy(weights, contexts)
        noise = torch.stack([torch.rand(*log_policy.shape[1:], config.samples, generator=g)
                             for g in self._generators(2, step)])  # fmt: skip
        with torch.no_grad():  # Gumbel's way to draw: the noise is the same for every policy
            actions = (log_policy[..., None] - (-noise.log()).log()).argmax(3)  # (S, T, count, samples)
            rewards = (actions == self.right(contexts)[..., None]).float()
            advantages = rewards - rewards.mean(3, keepdim=True)
        losses = -(advantages * log_policy.gather(3, actions)).mean((2, 3)) / config.domains  # (S, T)
        sums = losses.sum(0).unbind()  # a seed's weights are in its own losses alone
        every = [torch.autograd.grad(loss, weights, retain_graph=True) for loss in sums]
        return [torch.stack(parts) for parts in zip(*every, strict=True)]

    @torch.no_grad()
    def value(self, weights: Sequence[Tensor]) -> Tensor:
        """Expected reward in the contexts held out, ``(S, T)``."""
        chosen = self.log_policy(weights, self.held_out).gather(3, self.right(self.held_out)[..., None])
        return chosen.exp().mean((2, 3))

    def _generators(self, stream: int, step: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(mix_seed(seed, stream, step)) for seed in self.seeds]


def combined(
    bandit: Bandit, weights: Sequence[Tensor], step: int, granularity: BanditGranularity, surgery: bool
) -> tuple[list[Tensor], Tensor]:
    """Gradient of every weight ``(S, ...)``, and the Gram matrices of the domains' gradients ``(M, S, T, T)``."""
    gradients = bandit.gradients(weights, step)
    module = torch.tensor(MODULES[granularity])
    modules, domains = int(module.max()) + 1, bandit.config.domains
    parts = torch.stack([torch.einsum("tsij,usij->stu", part, part) for part in gradients]).double()
    grams = parts.new_zeros(modules, *parts.shape[1:]).index_add(0, module, parts)
    factors = torch.ones(grams.shape[:3])
    if surgery:  # every seed draws orders of its own
        orders = [draw_orders(mix_seed(seed, 3, step), modules, domains) for seed in bandit.seeds]
        found = surgery_weights(grams.flatten(0, 1), orders=torch.stack(orders, 1).flatten(0, 1))
        factors = found.view(factors.shape).float()
    return [torch.einsum("st,tsij->sij", factors[number], part)
            for number, part in zip(MODULES[granularity], gradients, strict=True)], grams  # fmt: skip


def run_bandit(
    config: BanditConfig, seeds: Sequence[int], granularity: BanditGranularity, surgery: bool = True
) -> BanditResult:
    """Train a policy for each seed.

    Args:
        config: Problem and training.
        seeds: One for each policy.
        granularity: What a module is, for surgery and for the conflicts that are counted.
        surgery: Whether gradients are operated on; otherwise they are added up.
    """
    bandit = Bandit(config, seeds)
    weights = [weight.clone().requires_grad_() for weight in bandit.first_weights]
    optimizer = torch.optim.Adam(weights, lr=config.lr)
    curve, values = [0], [bandit.value(weights)]
    first, second = torch.triu_indices(config.domains, config.domains, 1)
    conflicts, hidden, agreeing = torch.zeros(3, len(seeds))
    for step in range(config.late):
        gradients, grams = combined(bandit, weights, step, granularity, surgery)
        for weight, gradient in zip(weights, gradients, strict=True):
            weight.grad = gradient
        optimizer.step()
        dots = grams[..., first, second]  # (M, S, pairs)
        agree = dots.sum(0) >= 0
        conflicts += (dots < 0).float().mean((0, 2)) / config.late
        hidden += (agree & (dots < 0).any(0)).sum(1)
        agreeing += agree.sum(1)
        if (step + 1) % config.every == 0:
            curve.append(step + 1)
            values.append(bandit.value(weights))
    return BanditResult(curve, torch.stack(values), conflicts, hidden / agreeing.clamp(min=1))
