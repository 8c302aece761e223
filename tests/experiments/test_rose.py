"""The experiment of ROSE: its parts at the smallest scale, its presets, its mistakes."""

import json
from pathlib import Path

import pytest

from experiments.rose.__main__ import main as rose
from experiments.rose.arms import LEARNING, SCORES

ROOT = Path(__file__).parents[2]
QUIET = ["--trainer.enable_progress_bar=false"]
SMOKE = ["--scale", "smoke", *QUIET]
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 calls what jsonargparse 5 drops


@pytest.mark.slow
def test_its_parts_end_with_a_report_and_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    arms = ["at_entropy", "at_offdiag", "grpo", "rose", "rose_tokens", "alpha_0"]
    assert rose([*SMOKE, "--seeds", "0", "--jobs", "1", "--arms", *arms, "--runs_dir", str(tmp_path)]) == 0
    folder = tmp_path / "rose"
    report = json.loads((folder / "report.json").read_text())
    found = {arm["name"]: arm["metrics"] for arm in report["arms"]}
    assert set(found) == {"sft", *arms}
    assert {"decisions", "connectors", "distinct_answers", "mixed", "entropy_percentile", "table_cosine"} <= set(
        found["at_offdiag"]
    )
    assert found["rose_tokens"]["tokens_drawn"]["mean"] >= found["grpo"]["tokens_drawn"]["mean"]
    assert found["rose"]["tokens_drawn"]["mean"] < found["grpo"]["tokens_drawn"]["mean"]
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
        (["--model.tree.sampler=tree_rl"], "tree_rl makes 8 responses a prompt, got 4"),
        (["--model.estimator=mine"], "estimator"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], told: str) -> None:
    assert rose(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error


def test_every_arm_builds(tmp_path: Path) -> None:
    """The flags of each learning and branching arm fit together."""
    for flags in [*(part[2] for part in LEARNING), *(flags for _, flags in SCORES.values())]:
        with pytest.raises(SystemExit) as end:
            rose(["fit", "--scale", "tiny", *flags, "--print_config"])
        assert end.value.code in (0, None)
