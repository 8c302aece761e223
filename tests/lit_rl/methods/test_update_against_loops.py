"""Whole updates, several optimizer steps from fixed responses, against the same written as loops."""

from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from update_in_loops import Replay, prepared, rollout

from lit_core.backbones import BackboneConfig, Lora
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.tre import TRE
from lit_rl.modules.config import CriticConfig, ExplorationConfig, LossConfig, RolloutConfig, UpdateConfig

TWICE = UpdateConfig(epochs=2, mini_batches=2)
TRIE = UpdateConfig(epochs=2, mini_batches=2, layout="trie")
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
    "reinforce++": lambda: grpo(LossConfig(kl="k1", kl_in="reward", **KL), estimator="reinforce_pp", discount=0.9),
    "reinforce++ baseline": lambda: grpo(LossConfig(kl="k3_st", **KL), estimator="reinforce_pp_baseline"),
    "truncated weights": lambda: grpo(LossConfig(importance="token", importance_high=1.2, importance_low=0.9)),
    "masked weights": lambda: grpo(LossConfig(importance="sequence", importance_how="mask", importance_high=1.5)),
    "mean weights": lambda: grpo(LossConfig(importance="sequence_mean", importance_high=1.05)),
    "checkpointed": lambda: grpo(LossConfig(**KL), loading=BackboneConfig(gradient_checkpointing=True)),
    "adapters": lambda: grpo(LossConfig(kl="k3", **KL), lora=Lora(r=4, dropout=0.2)),
    "ppo": lambda: ppo(
        LossConfig(kl="k1", kl_in="reward", dual_clip=1.5, **KL), decay=0.9, critic=critic(clip=0.1), discount=0.95
    ),
    "ppo, head": lambda: ppo(
        critic=critic(kind="head", clip=None, coefficient=0.3), exploration=exploration("entropy")
    ),
    "ppo, reference in the loss": lambda: ppo(
        LossConfig(reduction="seq_mean_token_mean", **KL), critic=critic(clip=0.02)
    ),
    "tre-k": lambda: ppo(LossConfig(dual_clip=1.1), TRE, critic=critic(), exploration=exploration("tre_k", top_k=3)),
    "tre-p": lambda: ppo(method=TRE, critic=critic(), exploration=exploration("tre_p", top_p=0.4)),
    "tre-p, few": lambda: grpo(LossConfig(), exploration=exploration("tre_p", top_p=0.9, cap=6, scale="none")),
    "cool": lambda: grpo(
        LossConfig(kl="k3", **KL), exploration=exploration("entropy"), rollout=RolloutConfig(temperature=0.7, samples=2)
    ),
    "grpo, trie": lambda: grpo(LossConfig(reduction="seq_mean_token_mean", kl="k3", **KL), update=TRIE),
    "gspo, trie": lambda: grpo(LossConfig(reduction="seq_mean_token_mean", ratio="sequence_mean"), update=TRIE),
    "truncated weights, trie": lambda: grpo(
        LossConfig(importance="token", importance_high=1.2, importance_low=0.9), update=TRIE
    ),
    "ppo, head, trie": lambda: ppo(
        critic=critic(kind="head", clip=None, coefficient=0.3), exploration=exploration("entropy"), update=TRIE
    ),
    "tre-k, trie": lambda: ppo(
        LossConfig(dual_clip=1.1), TRE, critic=critic(), exploration=exploration("tre_k", top_k=3), update=TRIE
    ),
}


QUICK = ("grpo", "dapo", "adapters", "ppo", "tre-k", "grpo, trie", "tre-k, trie")  # the others are as short, but many
NAMES = [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in CASES]


@pytest.mark.parametrize("name", NAMES)
def test_losses_and_gradients_are_those_of_loops(name: str, tmp_path: Path) -> None:
    replay = Replay(CASES[name](), tmp_path)
    assert [len(rows) for rows in replay.module.dealt] == [len(rows) for rows in replay.module.dealt[:2]] * 2
    losses = []
    for rows, record in replay.steps():
        loss = replay.reference.loss(rows)
        replay.check(record, loss)
        losses.append(float(loss.detach()))
    assert replay.logged["policy/loss"] == pytest.approx(sum(losses) / 4, rel=1e-5, abs=1e-6)
    assert 0 < replay.logged["policy/clip_fraction"] < 0.9 or replay.module.loss.importance is not None
    assert replay.logged.get("policy/dual_clip_fraction", 1) > 0


@pytest.mark.parametrize("name", ["grpo", "dr grpo", pytest.param("tre-p", marks=pytest.mark.slow), "masked weights"])
def test_micro_batches_and_layout_change_nothing(name: str, tmp_path: Path) -> None:
    """Also where the last chunk holds the empty response alone."""
    found = []
    for micro_tokens, layout in (
        (None, "sorted"), (1, "sorted"), (25, "sorted"), (None, "shared"), (1, "shared"), (None, "trie"), (1, "trie")
    ):  # fmt: skip
        module = prepared(CASES[name]())
        module.update = UpdateConfig(1, 1, micro_tokens, layout)  # type: ignore[arg-type]
        run = worker.fit_fixed(module, rollout(branched=True), tmp_path)
        (record,) = run.optimizers[0].records  # type: ignore[attr-defined]
        gradient = torch.cat([gradient.flatten() for _, _, gradient in record])
        found.append((gradient, run.callback_metrics))
    expected, logged = found[0]
    for gradient, metrics in found[1:]:
        assert float((gradient - expected).norm()) < 1e-6 * float(expected.norm())
        for key in ("policy/loss", "policy/approx_kl", "policy/clip_fraction", "policy/ratio_max", "policy/grad_norm"):
            assert float(metrics[key]) == pytest.approx(float(logged[key]), rel=1e-5, abs=1e-6), key


@pytest.mark.parametrize("name", ["dapo", "dr grpo", "grpo"])
def test_groups_without_a_gradient_are_not_read(name: str, tmp_path: Path) -> None:
    """Nothing else changes; with a divergence in the loss they have a gradient."""
    found, read = [], []
    for everything in (False, True):
        module = prepared(CASES[name]())
        given, chunk_loss = rollout(), module.chunk_loss
        for row in (1, 4, 7):  # a group
            given.scores[row] = given.rewards[row] = 0.5
        if everything:
            module.learns_from_all = lambda: True
        rows: list[int] = []
        module.chunk_loss = lambda chunk, *rest, rows=rows, call=chunk_loss: (
            rows.extend(chunk.rows) or call(chunk, *rest)
        )
        run = worker.fit_fixed(module, given, tmp_path)
        records = run.optimizers[0].records  # type: ignore[attr-defined]
        found.append([torch.cat([gradient.flatten() for _, _, gradient in record]) for record in records])
        read.append(sorted(rows))
    for one, other in zip(*found, strict=True):
        assert float((one - other).norm()) < 1e-6 * float(other.norm())
    assert read[1] == sorted([*range(9)] * 2)
    assert ({1, 4, 7} & set(read[0]) == set()) == (name != "grpo")
