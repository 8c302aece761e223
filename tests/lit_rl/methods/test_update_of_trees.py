"""Updates from responses that branched from one another: a trie of their tokens gives what whole rows do."""

import math
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import policy_worker as worker
import pytest
import torch
from torch import Tensor, nn
from update_in_loops import prepared

from lit_core.lm_head import TokenLogProbs
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.tre import TRE
from lit_rl.modules import policy as policies
from lit_rl.modules.config import CriticConfig, ExplorationConfig, LossConfig, UpdateConfig
from lit_rl.modules.experience import Experience, Totals
from lit_rl.modules.layout import Layout, Sequences
from lit_rl.modules.rollouts import Rollout

KL = {"kl": "k3", "kl_coef": 0.3}
ENTROPY = ExplorationConfig(kind="entropy", coefficient=0.3)
CASES: dict[str, Callable[[], Any]] = {
    "grpo, divergence": lambda: worker.build(GRPO, loss=LossConfig(reduction="seq_mean_token_mean", **KL)),
    "grpo, entropy": lambda: worker.build(GRPO, loss=LossConfig(dual_clip=1.5), exploration=ENTROPY),
    "tre-k": lambda: worker.build(
        TRE, loss=LossConfig(), exploration=ExplorationConfig(kind="tre_k", coefficient=0.3, top_k=3)
    ),
    "ppo, head": lambda: worker.build(PPO, loss=LossConfig(**KL), critic=CriticConfig(kind="head", clip=0.1)),
    "ppo, critic": lambda: worker.build(PPO, loss=LossConfig(), critic=CriticConfig()),
}
LOGGED = ("policy/loss", "policy/approx_kl", "policy/clip_fraction", "policy/ratio_max", "policy/grad_norm")


class Update(NamedTuple):
    """Gradients of two optimizer steps, one after the other, what was logged, and the experience."""

    gradient: Tensor
    logged: dict[str, float]
    experience: Experience


def forest(seed: int) -> Rollout:
    """Four groups of six, interleaved; most responses go on from an earlier one of their group."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(1000) for _ in range(draw.randint(1, 6))] for _ in range(4)]
    groups = [0, 1, 2, 3] * 6
    responses: list[list[int]] = []
    for row, group in enumerate(groups):
        parent = responses[draw.choice(range(group, row, 4))] if row >= 8 else []
        taken = parent[: draw.randint(0, len(parent))]
        responses.append(taken + [draw.randrange(1000) for _ in range(draw.randint(row % 2, 6))])
    old = [[-6.9 + draw.uniform(-0.5, 0.5) for _ in response] for response in responses]
    scores = [draw.choice([0.0, 0.5, 1.0]) for _ in groups]
    return worker.fixed_rollout(Sequences([prompts[group] for group in groups], responses, groups), scores, old)


def apart_by_token(experience: Experience) -> None:
    """Give every token an advantage of its own, also where responses share it."""
    noise = torch.randn(experience.mask.shape, generator=torch.Generator().manual_seed(2))
    experience.advantages = torch.where(experience.mask, noise.to(experience.advantages), 0.0)


def updated(module: Any, layout: Layout, micro_tokens: int | None, seed: int, by_token: bool, folder: Path) -> Update:
    module.update = UpdateConfig(1, 2, micro_tokens, layout)
    estimate = module.advantages

    def advantages(rollout: Any, experience: Experience, penalties: Any) -> None:
        estimate(rollout, experience, penalties)
        if by_token:
            apart_by_token(experience)

    module.advantages = advantages
    run = worker.fit_fixed(module, forest(seed), folder)
    records = run.optimizers[0].records  # type: ignore[attr-defined]
    assert len(records) == 2
    gradient = torch.cat([gradient.flatten() for record in records for _, _, gradient in record])
    return Update(gradient, {key: float(value) for key, value in run.callback_metrics.items()}, module.experience)


@pytest.mark.parametrize(("seed", "by_token"), [(1, True), pytest.param(0, False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", CASES)
def test_a_trie_changes_nothing(name: str, seed: int, by_token: bool, tmp_path: Path) -> None:
    expected = updated(prepared(CASES[name]()), "sorted", None, seed, by_token, tmp_path)
    assert 0 < expected.logged["policy/clip_fraction"] < 1
    for micro_tokens in (None, 45):
        found = updated(prepared(CASES[name]()), "trie", micro_tokens, seed, by_token, tmp_path)
        apart, sizes = (found.gradient - expected.gradient).abs(), expected.gradient.abs()
        first = len(apart) // 2  # of the first step; the second starts from weights that rounding has moved
        assert float(apart[:first].max()) < 1e-6 * float(sizes[:first].max())
        assert float(apart.max()) < 1e-6
        for key in LOGGED:
            assert found.logged[key] == pytest.approx(expected.logged[key], rel=1e-5, abs=1e-6), key
        for one, other in zip(vars(found.experience).values(), vars(expected.experience).values(), strict=True):
            if isinstance(one, Tensor):
                torch.testing.assert_close(one, other, atol=2e-6, rtol=1e-5)


def plain_log_probs(states: Tensor, weight: Tensor, targets: Tensor, bias: Any, entropy: bool, *rest: Any) -> Any:
    """The head without its chunks, in its inputs' precision; what stays fixed is kept in float32."""
    logs = (states @ weight.T).log_softmax(-1)
    found = logs.gather(1, targets[:, None]).squeeze(1)
    found = found if torch.is_grad_enabled() else found.float()
    return TokenLogProbs(found, -(logs.exp() * logs).sum(1) if entropy else None)


def exact(module: Any) -> Any:
    """A method in float64, its norms too."""
    module.rollout = replace(module.rollout, recompute_log_probs=False)
    module = prepared(module).double()
    for part in list(module.modules()):
        for name, child in part.named_children():
            if child.__class__.__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(len(child.weight), child.variance_epsilon, dtype=torch.float64)
                norm.weight = child.weight
                setattr(part, name, norm)
    return module


@pytest.mark.parametrize(("seed", "by_token"), [(1, True), pytest.param(0, False, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", ["grpo, divergence", "grpo, entropy", "ppo, head"])
def test_nothing_at_all_in_double_precision(
    name: str, seed: int, by_token: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The cases with small gradients, whose single precision is the rounding of what cancels in them."""
    monkeypatch.setattr(policies, "token_log_probs", plain_log_probs)
    expected, found = (
        updated(exact(CASES[name]()), layout, 60, seed, by_token, tmp_path)  # type: ignore[arg-type]
        for layout in ("sorted", "trie")
    )
    assert found.gradient.dtype == torch.float64
    apart = (found.gradient - expected.gradient).abs().max()
    assert float(apart) < 1e-12 * float(expected.gradient.abs().max())


@pytest.mark.parametrize("layout", ["sorted", "shared", "trie"])
def test_advantages_of_a_shared_token_are_not_summed_before_the_clip(layout: Layout) -> None:
    """Its ratio is 1.5, its advantages 1 and -2: -1.2 + 3 = 1.8, while their sum of -1 would give 1.5."""
    module: Any = worker.build(GRPO, loss=LossConfig(reduction="const_norm", constant=1.0), scale="none")
    module.configure_model()
    sequences = Sequences([[3, 4]] * 2, [[5]] * 2, [0, 0])
    responses, mask = torch.tensor([[5], [5]]), torch.ones(2, 1, dtype=torch.bool)
    old = module.passes.log_probs(sequences, responses, mask) - math.log(1.5)
    experience = Experience(sequences, responses, mask, old, torch.tensor([[1.0], [-2.0]]))
    (chunk,) = sequences.chunks([0, 1], 100, torch.device("cpu"), layout)
    assert (chunk.nodes is not None and len(chunk.nodes.first) == 1) == (layout == "trie")
    scale = module.surrogate.denominators(experience, [0, 1], [chunk], None, module.update_constant([0, 1]))
    loss = module.chunk_loss(chunk, experience, scale, None, Totals(torch.device("cpu")), 0)
    assert float(loss.detach()) == pytest.approx(1.8, abs=1e-5)
