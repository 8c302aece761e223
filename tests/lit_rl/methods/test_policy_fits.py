"""Fits of policies in one process, on responses that they draw themselves."""

import math
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from lightning.pytorch import Callback
from policy_worker import ROLLOUT, Logged, SaveAt, build, fit, weights

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.modules.config import CriticConfig, ExplorationConfig, LossConfig, UpdateConfig

pytestmark = pytest.mark.slow

MANY = UpdateConfig(epochs=2, mini_batches=3, micro_tokens=100)
TOKEN_MEAN = LossConfig()


def grpo(**settings: Any) -> Any:
    return build(GRPO, **{"loss": TOKEN_MEAN, **settings})


def ppo(**settings: Any) -> Any:
    return build(PPO, **{"critic": CriticConfig(lr=0.05), **settings})


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("recompute", [False, True])
def test_the_first_step_is_on_policy(temperature: float, recompute: bool, tmp_path: Path) -> None:
    """The gradient is that of ``-A log pi`` under the sampling temperature, as a plain forward pass has it."""
    logged = Logged()
    rollout = replace(ROLLOUT, temperature=temperature, recompute_log_probs=recompute)
    module = grpo(optimizer=worker.Recorder, max_grad_norm=None, rollout=rollout, update=UpdateConfig(micro_tokens=60))
    module.configure_model()
    model = deepcopy(module.policy.model).double()
    run = fit(module, tmp_path, 1, logged)
    assert abs(logged.rows[0]["policy/ratio_max"] - 1) < 1e-5
    assert abs(logged.rows[0]["policy/approx_kl"]) < 1e-6
    assert logged.rows[0]["policy/clip_fraction"] == 0
    assert logged.rows[0].get("rollout/log_prob_gap", 0) < 1e-5
    assert ("rollout/log_prob_gap" in logged.rows[0]) == recompute
    drawn, total, tokens = module.latest, torch.zeros(()), 0
    for row, response in enumerate(drawn.sequences.responses):
        prompt = drawn.sequences.prompts[row]
        logits = model(input_ids=torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1] / temperature
        log_probs = logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None]).squeeze(1)
        torch.testing.assert_close(
            drawn.log_probs[row, : len(response)].double(), log_probs.detach(), atol=1e-5, rtol=0
        )
        group = torch.tensor([s for s, g in zip(drawn.rewards, drawn.sequences.groups, strict=True) if g == row // 4])
        total = total - (drawn.rewards[row] - group.mean()) / (group.std() + 1e-6) * log_probs.sum()
        tokens += len(response)
    (total / tokens).backward()
    (record,) = run.optimizers[0].records  # type: ignore[attr-defined]
    named = {id(parameter): name for name, parameter in module.policy.model.named_parameters()}
    for parameter, _, gradient in record:
        expected = model.get_parameter(named[id(parameter)]).grad
        assert float((gradient - expected).norm()) < 1e-5 * float(expected.norm().clamp(min=1e-3))


@pytest.mark.parametrize("build_one", [grpo, ppo], ids=["grpo", "ppo"])
def test_steps_are_batches_of_responses(build_one: Callable[..., Any], tmp_path: Path) -> None:
    """Whatever the epochs and mini-batches; the learning rate moves once a batch."""
    rates: list[list[float]] = []

    class Rates(Callback):
        def on_train_batch_start(self, trainer: Any, *args: Any) -> None:
            rates.append([group["lr"] for group in trainer.optimizers[0].param_groups])
            assert (trainer.global_step, pl_module.draws) == (len(rates) - 1, len(rates) - 1)

    pl_module = build_one(update=MANY, optimizer=worker.Recorder, schedule=Schedule("linear", warmup_steps=1))
    run = fit(pl_module, tmp_path, 5, Rates())
    assert (run.global_step, len(rates)) == (5, 5)
    assert len(run.optimizers[0].records) == 5 * 6  # type: ignore[attr-defined]
    assert [rate[0] / 0.02 for rate in rates] == pytest.approx([0, 1, 0.75, 0.5, 0.25])
    if build_one is ppo:
        assert [rate[-1] / 0.05 for rate in rates] == pytest.approx([0, 1, 0.75, 0.5, 0.25])


def test_a_batch_is_drawn_from_the_weights_of_the_update_before(tmp_path: Path) -> None:
    """Also from a stream without a length, of which the trainer fetches a batch ahead."""
    after: list[float] = []
    drawn_from: list[float] = []

    def fingerprint(module: Any) -> float:
        return sum(float(parameter.detach().double().abs().sum()) for parameter in module.policy.parameters())

    class After(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            after.append(fingerprint(pl_module))

    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            source = worker.data(tmp_path)
            source.setup("fit")
            return (source.splits["train"][at : at + 4] for at in range(0, 20, 4))

    module = grpo(optimizer=worker.adam)
    module.configure_model()
    start, draw = fingerprint(module), module._draw

    def watched(batch: Any) -> Any:
        drawn_from.append(fingerprint(module))
        return draw(batch)

    module._draw = watched
    collate = module.prompt_collator()
    loader: Any = torch.utils.data.DataLoader(Stream(), batch_size=None, collate_fn=collate)
    worker.trainer(tmp_path, 4, After()).fit(module, loader, loader)
    assert drawn_from == [start, *after[:-1]]
    assert len(set(after)) == 4


RESUMED: dict[str, Callable[[], Any]] = {
    "grpo": lambda: grpo(
        loss=LossConfig(kl_coef=0.05, kl_target=0.001, kl_horizon=100),
        update=MANY,
        exploration=ExplorationConfig(kind="adaptive_entropy", coefficient=0.01, target=5.0, adapt=0.002),
        optimizer=worker.adam,
        schedule=Schedule("cosine"),
    ),
    "ppo": lambda: ppo(
        loss=LossConfig(kl_coef=0.05, kl="k1", kl_in="reward", kl_target=0.001, kl_horizon=100),
        update=MANY,
        exploration=ExplorationConfig(kind="clip_cov", cov_low=0.0, cov_ratio=0.1),
        optimizer=worker.adam,
        schedule=Schedule("linear"),
        critic=CriticConfig(lr=0.01, warmup=4),
    ),
    "adapters": lambda: grpo(loss=LossConfig(kl_coef=0.05), lora=Lora(r=4), optimizer=worker.adam),
    "dynamic": lambda: grpo(rollout=replace(ROLLOUT, dynamic=True, samples=2), optimizer=worker.adam),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_fit_resumed_in_mid_epoch_ends_bit_for_bit_alike(name: str, tmp_path: Path) -> None:
    path, logs = tmp_path / "half.ckpt", (Logged(), Logged())
    whole, resumed = RESUMED[name](), RESUMED[name]()
    fit(whole, tmp_path, 8, SaveAt(path, 3), logs[0])  # an epoch has 6 batches
    torch.manual_seed(123)
    run = fit(resumed, tmp_path, 8, logs[1], ckpt=path)
    assert run.global_step == 8
    expected, found = weights(whole), weights(resumed)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    halted = torch.load(path, weights_only=True)["state_dict"]
    assert any(not torch.equal(halted[key], value) for key, value in expected.items())
    for key in ("policy/kl_coef", "policy/entropy_coef", "policy/loss", "rollout/reward_mean"):
        assert logs[0].rows[-1].get(key) == logs[1].rows[-1].get(key), key
    assert (whole.kl_coef, whole.entropy_coef, whole.draws) == (resumed.kl_coef, resumed.entropy_coef, resumed.draws)
    if name == "grpo":
        assert whole.kl_coef != 0.05
        assert whole.entropy_coef == pytest.approx(0.01 - 5 * 0.002)  # down to 0


@pytest.mark.parametrize("build_one", [grpo, ppo], ids=["grpo", "ppo"])
@pytest.mark.parametrize("at", [0, 1])
def test_a_gradient_that_is_not_finite_is_left_out(at: int, build_one: Callable[..., Any], tmp_path: Path) -> None:
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            seen.append(weights(pl_module))

    module, logged = build_one(optimizer=worker.adam), Logged()
    module.configure_model()
    start, chunk_loss = weights(module), module.chunk_loss
    module.chunk_loss = lambda *args: chunk_loss(*args) * (math.nan if module.global_step == at else 1)
    with pytest.warns(UserWarning, match=f"update {at} was left out"):
        run = fit(module, tmp_path, 3, Watch(), logged)
    before = [start, *seen]
    for step in range(3):
        same = all(torch.equal(before[step + 1][key], value) for key, value in before[step].items())
        assert same == (step == at)
    assert run.global_step == 3
    assert [row["train/skipped_steps"] for row in logged.rows] == [float(step >= at) for step in range(3)]
    assert all(value.isfinite().all() for value in seen[-1].values())


@pytest.mark.parametrize("interval", [1, 2])
def test_validation_between_steps_changes_nothing(interval: int, tmp_path: Path) -> None:
    """The trainer validates under inference mode."""
    plain, logged = grpo(loss=LossConfig(kl_coef=0.05)), Logged()
    fit(plain, tmp_path, 4)
    module = grpo(loss=LossConfig(kl_coef=0.05))
    fit(module, tmp_path, 4, logged, limit_val_batches=1.0, val_check_interval=interval, num_sanity_val_steps=1)
    expected = weights(plain)
    assert all(torch.equal(expected[key], value) for key, value in weights(module).items())
    assert {"val/reward", "val/success", "val/pass@2", "val/entropy", "val/score"} <= logged.rows[-1].keys()


@pytest.mark.parametrize("kind", ["separate", "head"])
def test_the_critic_learns_alone_at_first(kind: Any, tmp_path: Path) -> None:
    states, logged = [], Logged()

    class Watch(Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
            states.append(weights(pl_module))

    term = ExplorationConfig(kind="adaptive_entropy", coefficient=0.01)
    critic = CriticConfig(kind=kind, lr=0.01, warmup=2)
    module = ppo(critic=critic, exploration=term, optimizer=worker.adam)  # which decays weights
    module.configure_model()
    states.append(weights(module))
    fit(module, tmp_path, 3, Watch(), logged)
    for step in range(3):
        moved = {name for name, value in states[step].items() if not torch.equal(states[step + 1][name], value)}
        assert any(name.startswith("policy.") for name in moved) == (step == 2)
        assert any(name.startswith("critic.") and name.endswith("linear.weight") for name in moved)
    assert "policy/approx_kl" not in logged.rows[1]
    assert "policy/approx_kl" in logged.rows[2]
    assert module.entropy_coef == pytest.approx(0.01 - 0.005)


@pytest.mark.parametrize(("dtype", "precision"), [("bfloat16", "32-true"), ("float32", "bf16-mixed")])
@pytest.mark.parametrize("layout", ["sorted", "shared"])
def test_bfloat16_policies_are_trained(dtype: Any, precision: Any, layout: Any, tmp_path: Path) -> None:
    logged = Logged()
    loading, loss = BackboneConfig(dtype=dtype), LossConfig(kl_coef=0.01)
    module = ppo(loading=loading, update=UpdateConfig(layout=layout), loss=loss, optimizer=worker.adam)
    fit(module, tmp_path, 2, logged, precision=precision)
    for row in logged.rows:
        assert all(math.isfinite(value) for value in row.values())
        assert 0 < row["rollout/log_prob_gap"] < 0.1  # so the old ones are computed again
        assert row["policy/ratio_max"] == pytest.approx(1, abs=1e-3)
    assert module.skipped == 0


def test_precisions_that_round_log_probabilities_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="bf16-true would keep log-probabilities in 16 bits"):
        fit(grpo(), tmp_path, 1, precision="bf16-true")
