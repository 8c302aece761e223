"""The experiment of MGS: its bandit against single runs, its arms at the smallest scale, its mistakes."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from experiments.mgs import SPEC
from experiments.mgs.__main__ import main as mgs
from experiments.mgs.arms import build
from experiments.mgs.bandit import Bandit, BanditConfig, combined, run_bandit
from lit_core.files import read_json
from lit_core.setting import Setting
from lit_rl.modules.surgery import GradientSurgery

QUIET = ["--trainer.enable_progress_bar=false"]
SMOKE = ["--scale", "smoke", *QUIET]
SMALL = BanditConfig(inputs=5, hidden=6, actions=4, contexts=6, samples=4, early=2, late=4, every=2, held_out=16)
pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lightning 2.6 calls what jsonargparse 5 drops
    pytest.mark.filterwarnings("ignore:all problems are of one domain"),
]


@pytest.mark.parametrize("told", [False, True])
def test_seeds_of_the_bandit_do_not_see_each_other(told: bool) -> None:
    config = replace(SMALL, told=told)
    for granularity in ("param", "linear", "global"):
        together = run_bandit(config, [3, 8, 1], granularity)  # type: ignore[arg-type]
        alone = run_bandit(config, [8], granularity)  # type: ignore[arg-type]
        torch.testing.assert_close(together.values[:, 1:2], alone.values)
        torch.testing.assert_close(together.conflicts[1:2], alone.conflicts)
        torch.testing.assert_close(together.hidden[1:2], alone.hidden)
        assert together.curve == [0, 2, 4]
        assert bool((together.hidden == 0).all()) == (granularity == "global")


class Network(nn.Module):
    """The bandit's policy of one seed as a module, and its losses written out."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList()
        for matrix, bias in zip(weights[::2], weights[1::2], strict=True):
            layer = nn.Linear(matrix.shape[1], matrix.shape[2])
            layer.weight.data, layer.bias.data = matrix[0].T.contiguous(), bias[0, 0].clone()
            self.layers.append(layer)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        for layer in self.layers[:-1]:
            context = layer(context).tanh()
        return self.layers[-1](context).log_softmax(-1)


@pytest.mark.parametrize("granularity", ["param", "linear", "global"])
def test_gradients_of_the_bandit_equal_those_of_a_module(granularity: Any) -> None:
    """Action by action; of two domains the order does not matter."""
    config, seed = replace(SMALL, domains=2), 4
    bandit = Bandit(config, [seed])
    network = Network(bandit.first_weights)
    contexts = bandit.contexts(config.contexts, 0)
    right = bandit.right(contexts)
    noise = torch.rand(2, config.contexts, config.actions, config.samples, generator=bandit._generators(2, 0)[0])
    losses = {}
    for domain in range(2):
        terms = []
        for place in range(config.contexts):
            log_policy = network(contexts[0, domain, place])
            perturbed = log_policy[:, None] - (-noise[domain, place].log()).log()
            actions = perturbed.argmax(0)
            rewards = [float(action == right[0, domain, place]) for action in actions]
            mean = sum(rewards) / len(rewards)
            terms += [-(reward - mean) * log_policy[action] for reward, action in zip(rewards, actions, strict=True)]
        losses[str(domain)] = torch.stack(terms).mean() / 2
    surgery = GradientSurgery(network, ["0", "1"], granularity=granularity)
    surgery.backward(losses)
    expected = [part for layer in network.layers for part in (layer.weight.grad.T, layer.bias.grad[None])]
    weights = [weight.clone().requires_grad_() for weight in bandit.first_weights]
    found, grams = combined(bandit, weights, 0, granularity, surgery=True)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours[0], theirs)
    assert surgery.gram is not None
    torch.testing.assert_close(grams[:, 0].sum(0), surgery.gram.sum(0))


def test_conflicts_of_the_bandit_stand_where_gradients_agree_as_a_whole() -> None:
    found = run_bandit(replace(BanditConfig(), early=20, late=40), range(3), "param", surgery=False)
    assert 0.3 < float(found.conflicts.mean()) < 0.7
    assert float(found.hidden.mean()) > 0.3
    assert float(found.at(40).mean()) > float(found.at(0).mean())


@pytest.mark.slow
def test_its_arms_end_with_a_report_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    arms = ["bandit_mixed", "bandit_param", "mixed", "mgs", "stages_math_chat_if", "linear", "task_arithmetic"]
    args = [*SMOKE, "--seeds", "0", "--jobs", "1", "--arms", *arms, "--runs_dir", str(tmp_path)]
    assert mgs(args) == 0
    folder = tmp_path / "mgs"
    report = json.loads((folder / "report.json").read_text())
    found = {arm["name"]: arm for arm in report["arms"]}
    experts = [f"expert_{domain}" for domain in ("math", "chat", "if")]
    assert set(found) == {"sft", *experts, *arms}
    assert {"forgetting", "rigidity"} <= set(found["stages_math_chat_if"]["metrics"])
    assert {"conflict_ratio", "domain_worst/reward", "math/reward"} <= set(found["mgs"]["metrics"])
    steps = {name: found[name]["cost"]["steps"] - found["sft"]["cost"]["steps"] for name in found if name != "sft"}
    assert steps["mixed"] == steps["mgs"] == steps["stages_math_chat_if"] == steps["linear"] == 6
    assert [steps[name] for name in experts] == [2, 2, 2]
    for name in ("Conflicts_under_mixing", "Conflicts_under_MGS", "Bandit", "val_math_reward_over_training"):
        assert (folder / f"{name}.png").stat().st_size > 5000, name
    curve = read_json(folder / "stages_math_chat_if" / "seed0" / "curves.json")["val/math/reward"]
    assert [step for step, _ in curve] == [2, 4, 6]
    exports = [load_file(folder / name / "seed0" / "export" / "model.safetensors") for name in experts]
    merged = load_file(folder / "linear" / "seed0" / "merged" / "model.safetensors")
    for key, value in merged.items():
        torch.testing.assert_close(value, sum(export[key] for export in exports) / 3)
    # a stage that is done is not done again
    stage = folder / "stages_math_chat_if" / "seed0"
    before = (stage / "chat" / "results.json").stat().st_mtime_ns
    results = (stage / "results.json").read_text()
    (stage / "results.json").unlink()
    (stage / "if" / "results.json").unlink()
    assert mgs(args) == 0
    assert (stage / "chat" / "results.json").stat().st_mtime_ns == before
    again = json.loads((stage / "results.json").read_text())
    assert again["metrics"] == json.loads(results)["metrics"]


def test_the_experiment_builds() -> None:
    experiment = build(Setting(SPEC, "tiny", ()))
    main = [arm.name for arm in experiment.arms if arm.main]
    assert {"mixed", "global", "mgs", "normalised", "linear", "stages_math_chat_if", "stages_if_chat_math"} <= set(main)
    two = build(Setting(SPEC, "tiny", ("--data.domains={a: {task: sums}, b: {task: chat_words}}",)))
    assert [arm.name for arm in two.arms if arm.name.startswith("stages")] == ["stages_a_b", "stages_b_a"]
    one = build(Setting(SPEC, "tiny", ("--data.domains={a: {task: sums}}",)))
    assert not [arm.name for arm in one.arms if arm.name.startswith("stages")]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data.train_on=[law]"], "train_on': must be some of math, chat, if, got 'law'"),
        (["--model.surgery.granularity=atom"], "granularity"),
        (["--model.surgery.domains=[math, chat]"], "does not list the domain 'if'"),
        (["--data.batch_size=2"], "which is none of a batch of 2"),
        (["--model.prompt.template=none"], "prompt.template': needs {prompt}"),
        (["--data.domains.math.path=nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], told: str) -> None:
    assert mgs(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


@pytest.mark.slow
def test_one_domain_is_plain_grpo_and_says_so(tmp_path: Path) -> None:
    flags = ["--data.train_on=[math]", "--trainer.max_steps=2", "--trainer.default_root_dir", str(tmp_path)]
    with pytest.warns(UserWarning, match="all problems are of one domain, 'math'"):
        assert mgs(["fit", *SMOKE, *flags]) == 0
    curves = read_json(tmp_path / "curves.json")
    assert not [name for name in curves if name.startswith("surgery/")]
    assert {"val/math/reward", "val/chat/reward", "val/if/reward"} <= set(curves)
