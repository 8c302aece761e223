"""What policies learn from and are judged by: dynamic sampling, warnings, evaluation, settings that do not fit."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from lightning.pytorch import Callback
from policy_worker import ROLLOUT, Logged, SaveAt, build, fit, weights

from lit_core.backbones import Lora
from lit_core.errors import InputError
from lit_core.samplers import mix_seed
from lit_rl.methods import policy_gradient
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.methods.tre import TRE
from lit_rl.modules.config import CriticConfig, LossConfig, RolloutConfig, UpdateConfig
from lit_rl.modules.evaluation import per_problem, summarise

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lightning 2.6 calls what jsonargparse 5 drops
]

PAIRS = replace(ROLLOUT, samples=2, dynamic=True, most_draws=4)


class Scripted:
    """Rewards by batch: as many groups as the script says have two different ones."""

    def __init__(self, *informative: int) -> None:
        self.informative = list(informative)
        self.drawn: list[list[str]] = []

    def rewards(self, problems: Sequence[Any], responses: Sequence[str]) -> list[float]:
        self.drawn.append(list(responses))
        count = self.informative[len(self.drawn) - 1]
        return [float(row % 2 == 0 and row // 2 < count) for row in range(len(responses))]

    def close(self) -> None:
        """Nothing is open."""


class Updates(Callback):
    """Weights after each batch, and the responses that each update has learned from."""

    def __init__(self, module: Any) -> None:
        module.configure_model()
        self.seen, self.learned = [weights(module)], list[tuple[list[int], list[list[int]]]]()
        learn = module._learn

        def watched(experience: Any, totals: Any) -> None:
            self.learned.append((list(experience.sequences.groups), list(experience.sequences.responses)))
            learn(experience, totals)

        module._learn = watched

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *args: Any) -> None:
        self.seen.append(weights(pl_module))

    @property
    def moved(self) -> list[bool]:
        """Whether each batch has changed the weights."""
        return [
            any(not torch.equal(after[key], value) for key, value in before.items())
            for before, after in zip(self.seen, self.seen[1:], strict=False)
        ]


def dynamic(folder: Path, script: Sequence[int], steps: int, **settings: Any) -> tuple[Any, Updates, Logged]:
    module = build(GRPO, loss=LossConfig(), rollout=replace(PAIRS, **settings))
    module.scorer = Scripted(*script)
    updates, logged = Updates(module), Logged()
    run = fit(module, folder, steps, updates, logged)
    assert run.global_step == steps
    return module, updates, logged


def test_dynamic_sampling_draws_until_a_batch_is_full(tmp_path: Path) -> None:
    """Four groups of two: 1 + 2 + 3 are enough, the last two of them are left out."""
    module, updates, logged = dynamic(tmp_path, [1, 2, 3, 4, 4], 3)
    assert updates.moved == [False, False, True, True, True]
    assert (module.draws, len(module.scorer.drawn)) == (5, 5)
    assert [row["rollout/draws"] for row in logged.rows[2:]] == [3, 1, 1]
    assert logged.rows[1]["rollout/all_equal"] == 0.5
    groups, responses = updates.learned[0]
    assert groups == [0, 0, 1, 1, 2, 2, 3, 3]
    texts = [module.policy.tokenizer.decode(response) for response in responses]
    drawn = module.scorer.drawn
    assert texts == [*drawn[0][:2], *drawn[1][:4], *drawn[2][:2]]
    assert logged.rows[2]["rollout/reward_mean"] == 0.5


class SaveBehind(Callback):
    """Writes a checkpoint after a batch of problems."""

    def __init__(self, path: Path, batch: int) -> None:
        self.path, self.batch = path, batch

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch and not self.path.exists():
            trainer.save_checkpoint(self.path)


def test_groups_that_wait_are_in_checkpoints(tmp_path: Path) -> None:
    """Two draws have given three of four groups when the state is saved."""
    path = tmp_path / "waiting.ckpt"
    whole, again = (build(GRPO, loss=LossConfig(), rollout=PAIRS) for _ in range(2))
    whole.scorer, again.scorer = Scripted(1, 2, 3, 4, 4), Scripted(3, 4, 4)
    fit(whole, tmp_path, 3, SaveBehind(path, 1))
    fit(again, tmp_path, 3, ckpt=path)
    assert again.scorer.drawn == whole.scorer.drawn[2:]
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], value, atol=0, rtol=0)


def test_dynamic_sampling_gives_up_and_takes_what_there_is(tmp_path: Path) -> None:
    module, updates, logged = dynamic(tmp_path, [0, 1, 0, 1, 4], 2)
    assert updates.moved == [False, False, False, True, True]
    assert [len(groups) for groups, _ in updates.learned] == [4, 8]  # two groups of one and one
    assert logged.rows[3]["rollout/draws"] == 4
    assert module.waiting == []


def test_dynamic_sampling_without_any_signal_changes_nothing(tmp_path: Path) -> None:
    """The last batch is learned from, whose advantages are all 0, and the step is counted."""
    _, updates, _ = dynamic(tmp_path, [0, 0, 0, 0, 4], 2)
    assert updates.moved == [False] * 4 + [True]
    assert [len(groups) for groups, _ in updates.learned] == [8, 8]


@pytest.mark.parametrize("samples", [1, 2])
def test_batches_without_a_signal_are_told_once(samples: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(policy_gradient, "HOPELESS", 3)
    rollout = replace(ROLLOUT, samples=samples)
    module = build(PPO, rollout=rollout, critic=CriticConfig(lr=1e-3))
    module.scorer = Scripted(*[0] * 5)
    with pytest.warns(UserWarning, match="in 3 batches the rewards of every group were all equal") as caught:
        fit(module, tmp_path, 5)
    assert len([one for one in caught if "all equal" in str(one.message)]) == 1
    assert module.dull == 5


def test_single_samples_with_different_rewards_are_a_signal(tmp_path: Path) -> None:
    module = build(PPO, rollout=replace(ROLLOUT, samples=1), critic=CriticConfig(lr=1e-3))
    module.scorer = Scripted(*[2] * 3)  # the first rows of a batch
    fit(module, tmp_path, 3)
    assert module.dull == 0


class Letters:
    """Rewards responses that hold an ``o``."""

    def rewards(self, problems: Sequence[Any], responses: Sequence[str]) -> list[float]:
        return [float("o" in response) for response in responses]

    def close(self) -> None:
        """Nothing is open."""


def quick(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-2)


@pytest.mark.parametrize(
    "make",
    [
        lambda **settings: build(GRPO, loss=LossConfig(), **settings),
        lambda **settings: build(TRE, critic=CriticConfig(lr=3e-3), **settings),
        lambda **settings: build(GRPO, estimator="reinforce_pp", loss=LossConfig(), lora=Lora(r=4), **settings),
    ],
    ids=["grpo", "tre", "adapters"],
)
def test_policies_learn_what_is_rewarded(make: Callable[..., Any], tmp_path: Path) -> None:
    rollout = RolloutConfig(samples=8, max_tokens=6)
    module = make(rollout=rollout, update=UpdateConfig(mini_batches=2), optimizer=quick)
    module.scorer, logged = Letters(), Logged()
    module.configure_model()
    if module.lora.r > 0:  # rows of a frozen head as short as they are at first would prefer no token
        module.policy.model.get_input_embeddings().weight.data.mul_(10)
    fit(module, tmp_path, 25, logged)
    rewards = [row["rollout/reward_mean"] for row in logged.rows]
    assert sum(rewards[:3]) / 3 < 0.7
    assert sum(rewards[-3:]) / 3 > 0.95


@pytest.mark.filterwarnings("ignore:You are using a custom batch sampler")  # it gives all rows
def test_evaluation_is_the_same_at_every_batch_size(tmp_path: Path) -> None:
    module = build(GRPO, loss=LossConfig())
    run = worker.trainer(tmp_path, 1, limit_val_batches=1.0)
    data = worker.data(tmp_path)
    run.test(module, datamodule=data, verbose=False)
    results = module.results
    logged = {key: float(value) for key, value in run.callback_metrics.items() if key != "test/score"}
    assert logged == pytest.approx({f"test/{key}": value for key, value in summarise(results).items()})
    assert run.callback_metrics["test/score"] == run.callback_metrics["test/reward"]
    assert per_problem(results).keys() >= {"reward", "success", "pass@2", "maj@2"}
    assert {"entropy", "tail_mass", "region_entropy", "region_size"} <= results[0].sums.keys()
    found = run.predict(module, datamodule=worker.data(tmp_path))
    predicted = [result for batch in found or [] for result in batch]  # type: ignore[union-attr]
    assert [(one.id, one.texts) for one in predicted] == [(one.id, one.texts) for one in results]
    problems = data.splits["train"][:5]
    together = module.respond(module.prompt_collator()(problems))
    apart = [module.respond(module.prompt_collator()([problem]))[0] for problem in problems]
    assert [one.texts for one in together] == [one.texts for one in apart]
    assert [one.rewards for one in together] == [one.rewards for one in apart]


def test_a_checkpoint_brings_its_settings_along(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    loss = LossConfig(kl_coef=0.05, clip_high=0.3)
    module = build(TRE, loss=loss, lora=Lora(r=4), critic=CriticConfig(kind="head"))
    fit(module, tmp_path, 2, SaveAt(path, 2))
    saved = torch.load(path, weights_only=True)
    assert all(".lora_" in name or name.startswith("critic.") for name in saved["state_dict"])
    loaded: Any = TRE.load_from_checkpoint(path, weights_only=True)
    assert (loaded.loss, loaded.rollout, loaded.exploration) == (loss, module.rollout, module.exploration)
    assert (loaded.critic_config, loaded.lora) == (module.critic_config, module.lora)
    trained, found = weights(module), weights(loaded)
    assert trained.keys() == found.keys()
    assert all(torch.equal(found[key], value) for key, value in trained.items())
    with pytest.raises(InputError, match="written by TRE, not by GRPO"):
        GRPO.load_from_checkpoint(path, weights_only=True)


def test_a_full_checkpoint_leaves_the_reference_out(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = build(GRPO, loss=LossConfig(kl_coef=0.05))
    fit(module, tmp_path, 2, SaveAt(path, 2))
    saved = torch.load(path, weights_only=True)
    assert not any(".frozen." in name for name in saved["state_dict"])
    assert saved[policy_gradient.STATE_KEY]["draws"] == 2
    loaded: Any = GRPO.load_from_checkpoint(path, weights_only=True)
    start = build(GRPO, loss=LossConfig())
    start.configure_model()
    for (name, value), expected in zip(
        loaded.policy.frozen.named_parameters(), start.policy.model.parameters(), strict=True
    ):
        assert torch.equal(value, expected), name


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="grpo compares the samples of a prompt: at least 2, got 1"):
        build(GRPO, rollout=replace(ROLLOUT, samples=1))
    for layout in ("shared", "trie"):
        module = build(GRPO, update=UpdateConfig(layout=layout))  # type: ignore[arg-type]
        module.configure_model()
        module.policy.model.config._attn_implementation = "flash_attention_2"
        with pytest.raises(InputError, match="this backbone, or its attention, cannot share prompts or prefixes"):
            module.configure_model()
    assert mix_seed(0, 1) != mix_seed(0, 2)
