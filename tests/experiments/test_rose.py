"""The experiment of ROSE: its parts at the smallest scale, its presets, its mistakes."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.rose import SPEC
from experiments.rose.__main__ import main as rose
from experiments.rose.arms import LEARNING, SCORES, SHAPES, build, shape_flags
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_rl.modules.trees.config import TreeConfig

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.enable_progress_bar=false"]
SMOKE = ["--scale", "smoke", *QUIET]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 calls what jsonargparse 5 drops


@pytest.mark.slow
def test_its_parts_end_with_a_report_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    arms = ["at_entropy", "at_offdiag", "grpo", "rose", "grpo_tokens", "alpha_0"]
    assert rose([*SMOKE, "--seeds", "0", "--jobs", "1", "--arms", *arms, "--runs_dir", str(tmp_path)]) == 0
    folder = tmp_path / "rose"
    report = json.loads((folder / "report.json").read_text())
    found = {arm["name"]: arm["metrics"] for arm in report["arms"]}
    assert set(found) == {"sft", *arms}
    assert {"decisions", "connectors", "distinct_answers", "mixed", "entropy_percentile", "table_cosine"} <= set(
        found["at_offdiag"]
    )
    drawn = {name: found[name]["tokens_drawn"]["mean"] for name in ("grpo", "grpo_tokens", "rose")}
    assert drawn["rose"] <= drawn["grpo_tokens"] <= drawn["grpo"]
    assert drawn["rose"] < drawn["grpo"]
    for name in ("Where_trees_branch", "Branch_positions", "val_success_over_tokens", "A_tree"):
        assert (folder / f"{name}.png").stat().st_size > 5000
    tree = json.loads((folder / "at_offdiag" / "seed0" / "trees.json").read_text())[0]
    for response in tree["responses"]:
        mean = sum(other["reward"] for other in tree["responses"]) / len(tree["responses"])
        assert len(response["advantages"]) == len(response["pieces"])
        if response["reward"] <= 0.5:  # the advantages of its segments add up to the reward less the mean
            ends = [k for k, a in enumerate(response["advantages"]) if k == 0 or a != response["advantages"][k - 1]]
            assert sum(response["advantages"][k] for k in ends) == pytest.approx(response["reward"] - mean, abs=1e-5)


@pytest.mark.parametrize("preset", ["rose_paper", "rose_code"])
def test_presets_lie_over_the_defaults(preset: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = ROOT / "experiments" / "rose" / "presets" / f"{preset}.yaml"
    with pytest.raises(SystemExit) as end:
        rose(["fit", "--config", str(path), "--print_config"])
    assert end.value.code in (0, None)
    assert f"freeze_embeddings: {'true' if preset == 'rose_code' else 'false'}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--model.tree.epsilon=1.2"], "tree.epsilon': is a probability, in [0, 1], got 1.2"),
        (["--model.rollout.samples=1"], "rollout.samples': a tree needs at least 2 responses a prompt, got 1"),
        (["--model.length_penalty=-1"], "length_penalty': must be at least 0, got -1.0"),
        (["--model.tree.score=luck"], "score"),
        (
            ["--model.tree.sampler=tree_rl", "--model.tree.chains=1", "--model.tree.children=4"],
            "tree_rl makes 5 responses a prompt, got 8",
        ),
        (["--model.estimator=mine"], "estimator"),
        (["--model.tree.top_k=100000"], "tree.top_k': must be at most the 1024 tokens"),
        (["--model.tree.kept=2"], "only tree_rl learns from some of the responses, not segments"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], told: str) -> None:
    assert rose(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


@pytest.mark.parametrize("scale", ["smoke", "tiny", "paper"])
def test_shapes_make_the_responses_that_are_asked_for(scale: str) -> None:
    for name in SHAPES[scale]:
        flags = [flag.rpartition(".")[2].split("=") for flag in shape_flags(scale, name) if "dynamic" not in flag]
        fields: dict[str, Any] = {key: yaml.safe_load(value) for key, value in flags}
        samples = fields.pop("samples", 8)
        if "factors" in fields:
            fields["factors"] = tuple(fields["factors"])
        tree = TreeConfig(sampler=name, **fields)  # type: ignore[arg-type]
        tree.check_group(samples)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dapo", "fr3e", "tree_po", "spo_tree", "at_rao"])
def test_flags_of_arms_fit_together(name: str, tmp_path: Path) -> None:
    flags = {arm: flags for arm, _, flags, _ in LEARNING} | {f"at_{arm}": part[1] for arm, part in SCORES.items()}
    args = ["fit", *flags[name], *shape_flags("tiny", name)]
    cli = ExperimentCLI(SPEC, args, SPEC.configs("tiny"), tmp_path, quiet=True, execute=False)
    assert cli.model.tree.sampler == {"dapo": "independent", "at_rao": "branching"}.get(name, name)


def test_the_experiment_builds() -> None:
    experiment = build(Setting(SPEC, "tiny", ()))
    assert [arm.name for arm in experiment.arms if arm.main] == [
        *("sft", "at_random", "at_entropy", "at_offdiag", "at_rao", "grpo", "entropy_tree", "rose", "grpo_tokens")
    ]
