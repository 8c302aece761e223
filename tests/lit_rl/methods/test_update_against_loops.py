"""Whole updates, several optimizer steps from fixed responses, against the same written as loops."""

import random
from copy import deepcopy
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from torch import Tensor
from update_in_loops import Update

from lit_core.backbones import Lora
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.tre import TRE
from lit_rl.modules.config import CriticConfig, ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.layout import Sequences
from lit_rl.modules.rollouts import Rollout

TWICE = UpdateConfig(epochs=2, mini_batches=2)
KL = {"kl_coef": 0.3}


def grpo(loss: LossConfig, **settings: Any) -> Any:
    return worker.build(GRPO, **{"loss": loss, "update": TWICE, **settings})


def ppo(loss: LossConfig | None = None, method: Any = PPO, **settings: Any) -> Any:
    return worker.build(method, **{"loss": loss or LossConfig(), "update": TWICE, **settings})


def critic(**settings: Any) -> CriticConfig:
    return CriticConfig(**{"lr": 0.05, **settings})


def exploration(kind: Any, **settings: Any) -> ExplorationConfig:
    return ExplorationConfig(kind=kind, coefficient=0.3, **settings)


CASES: dict[str, Any] = {
    "grpo": lambda: grpo(LossConfig(reduction="seq_mean_token_mean", kl="k3", **KL)),
    "dr grpo": lambda: grpo(LossConfig(reduction="const_norm"), scale="none"),
    "dr grpo, divided by 11": lambda: grpo(LossConfig(reduction="const_norm", constant=11.0, **KL), scale="none"),
    "dapo": lambda: grpo(LossConfig(clip_high=0.28, dual_clip=1.1)),
    "batch deviation": lambda: grpo(LossConfig(kl="k2", **KL), scale="batch"),
    "rloo": lambda: grpo(LossConfig(reduction="seq_mean_token_sum", kl="k1", kl_in="reward", **KL), estimator="rloo"),
    "rloo, sequence ratio": lambda: grpo(
        LossConfig(reduction="seq_mean_token_mean", ratio="sequence_sum", clip_low=0.6, clip_high=2.0), estimator="rloo"
    ),
    "gspo": lambda: grpo(LossConfig(reduction="seq_mean_token_mean", ratio="sequence_mean")),
    "reinforce++": lambda: grpo(
        LossConfig(kl="k1", kl_in="reward", **KL), estimator="reinforce_pp", discount=0.9
    ),
    "reinforce++ baseline": lambda: grpo(LossConfig(kl="k3_st", **KL), estimator="reinforce_pp_baseline"),
    "truncated weights": lambda: grpo(LossConfig(importance="token", importance_high=1.2, importance_low=0.9)),
    "masked weights": lambda: grpo(LossConfig(importance="sequence", importance_how="mask", importance_high=1.5)),
    "mean weights": lambda: grpo(LossConfig(importance="sequence_mean", importance_high=1.05)),
    "adapters": lambda: grpo(LossConfig(kl="k3", **KL), lora=Lora(r=4, dropout=0.2)),
    "ppo": lambda: ppo(
        LossConfig(kl="k1", kl_in="reward", dual_clip=1.5, **KL), decay=0.9, critic=critic(clip=0.1), discount=0.95
    ),
    "ppo, head": lambda: ppo(critic=critic(kind="head", clip=None, coefficient=0.3), exploration=exploration("entropy")),
    "ppo, reference in the loss": lambda: ppo(LossConfig(reduction="seq_mean_token_mean", **KL), critic=critic(clip=0.02)),
    "tre-k": lambda: ppo(LossConfig(dual_clip=1.1), TRE, critic=critic(), exploration=exploration("tre_k", top_k=3)),
    "tre-p": lambda: ppo(method=TRE, critic=critic(), exploration=exploration("tre_p", top_p=0.4)),
    "tre-p, few": lambda: grpo(LossConfig(), exploration=exploration("tre_p", top_p=0.9, cap=6, scale="none")),
    "cool": lambda: grpo(
        LossConfig(kl="k3", **KL), exploration=exploration("entropy"), rollout=RolloutConfig(temperature=0.7, samples=2)
    ),
}  # fmt: skip


QUICK = ("grpo", "dapo", "adapters", "ppo", "tre-k")  # the others are as short, but many


def rollout(seed: int = 0) -> Rollout:
    """Groups interleaved and of different sizes, an empty response and one of a single token."""
    draw = random.Random(seed)
    groups, lengths = [0, 1, 2, 0, 1, 2, 0, 1, 2], [5, 3, 0, 1, 4, 6, 2, 5, 3]
    prompts = [[draw.randrange(1000) for _ in range(length)] for length in (4, 7, 2)]
    responses = [[draw.randrange(1000) for _ in range(length)] for length in lengths]
    scores = [draw.choice([0.0, 0.5, 1.0]) for _ in groups]
    old = [[-6.9 + draw.uniform(-0.5, 0.5) for _ in range(length)] for length in lengths]  # far from the trainer's
    return worker.fixed_rollout(Sequences([prompts[group] for group in groups], responses, groups), scores, old)


def prepared(name: str) -> Any:
    """A method whose policy is not its reference and whose values are not 0."""
    module = CASES[name]()
    module.optimizer = worker.Recorder
    module.max_grad_norm = None
    module.configure_model()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += 0.03 * torch.randn(parameter.shape, generator=generator)
    return module


def doubled(module: Any) -> tuple[dict[str, Any], dict[int, Tensor]]:
    """Models of the reference in float64, and their weights by the numbers of those in training."""
    policy = deepcopy(module.policy).double()
    parts = {"policy": policy.model, "frozen": None, "critic": None, "head": None}
    pairs = list(zip(module.policy.parameters(), policy.parameters(), strict=True))
    if module.needs_reference:
        parts["frozen"] = deepcopy(policy.model.unload()) if policy.adapted else policy.frozen
        parts["policy"] = deepcopy(module.policy.model).double() if policy.adapted else policy.model
        pairs = list(zip(module.policy.model.parameters(), parts["policy"].parameters(), strict=True))
    if isinstance(module, PPO):
        copied = deepcopy(module.critic).double()
        pairs += zip(module.critic.parameters(), copied.parameters(), strict=True)
        separate = module.critic_config.kind == "separate"
        parts |= {"critic": copied.model if separate else None, "head": copied.head if separate else copied}
    return parts, {id(own): copy for own, copy in pairs}


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES])
def test_losses_and_gradients_are_those_of_loops(name: str, tmp_path: Path) -> None:
    module = prepared(name)
    parts, copies = doubled(module)
    given = rollout()
    reference = Update(module, rollout=given, **parts)
    run = worker.fit_fixed(module, given, tmp_path)
    records = run.optimizers[0].records  # type: ignore[attr-defined]
    assert [len(rows) for rows in module.dealt] == [len(rows) for rows in module.dealt[:2]] * 2
    assert len(records) == 4
    logged = {key: float(value) for key, value in run.callback_metrics.items()}
    assert 0 < logged["policy/clip_fraction"] < 0.9 or module.loss.importance is not None
    assert logged.get("policy/dual_clip_fraction", 1) > 0
    losses = []
    for rows, record in zip(module.dealt, records, strict=True):
        for own, before, _ in record:
            copies[id(own)].data.copy_(before)
            copies[id(own)].grad = None
        loss = reference.loss(rows)
        loss.backward()
        losses.append(float(loss.detach()))
        assert len(record) == sum(parameter.requires_grad for parameter in module.parameters())
        everything = [(gradient.double(), copies[id(own)].grad) for own, _, gradient in record]
        wanted = [torch.zeros_like(one) if other is None else other for one, other in everything]
        whole = torch.cat([(one - other).flatten() for (one, _), other in zip(everything, wanted, strict=True)])
        assert float(whole.norm()) < 2e-6 * float(torch.cat([other.flatten() for other in wanted]).norm())
        for (one, _), other in zip(everything, wanted, strict=True):
            assert float((one - other).abs().max()) < 1e-6 + 1e-4 * float(other.abs().max())
    assert logged["policy/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("name", ["grpo", "dr grpo", pytest.param("tre-p", marks=pytest.mark.slow), "masked weights"])
def test_micro_batches_and_layout_change_nothing(name: str, tmp_path: Path) -> None:
    """Also where the last chunk holds the empty response alone."""
    found = []
    for micro_tokens, layout in ((None, "sorted"), (1, "sorted"), (25, "sorted"), (None, "shared"), (1, "shared")):
        module = prepared(name)
        module.update = UpdateConfig(1, 1, micro_tokens, layout)  # type: ignore[arg-type]
        run = worker.fit_fixed(module, rollout(), tmp_path)
        (record,) = run.optimizers[0].records  # type: ignore[attr-defined]
        gradient = torch.cat([gradient.flatten() for _, _, gradient in record])
        found.append((gradient, run.callback_metrics))
    expected, logged = found[0]
    for gradient, metrics in found[1:]:
        assert float((gradient - expected).norm()) < 1e-6 * float(expected.norm())
        for key in ("policy/loss", "policy/approx_kl", "policy/clip_fraction", "policy/ratio_max", "policy/grad_norm"):
            assert float(metrics[key]) == pytest.approx(float(logged[key]), rel=1e-5, abs=1e-6), key
