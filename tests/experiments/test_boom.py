"""The experiment of BOOM: its arms, a merge of members at the smallest scale, a killed member, its mistakes."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from experiments.boom import SPEC, arms, training
from experiments.boom.__main__ import main as boom
from experiments.boom.arms import MEMBERS, build
from experiments.boom.figures import domains
from experiments.boom.merges import side_by_side
from experiments.boom.training import Trained, data_of, groups_of_tasks, names_flag, trained_arm
from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.merging import merge
from lit_core.presets import preset_config, preset_tokenizer
from lit_core.reproduce import Arm, ArmContext, Clock
from lit_core.setting import Setting
from lit_embed.data.bagging import sample_size, size_weights
from lit_embed.data.families import DOMAINS
from tests.experiments.test_real_data import part_of

ROOT = Path(__file__).parents[2]
SMOKE = ["--scale", "smoke", "--trainer.enable_progress_bar=false", "--jobs", "1"]
THREE = "--data.train_on=[travel-classification,household-sts,workshop-retrieval]"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # lightning 2.6 calls what jsonargparse 5 drops


def results(root: Path, arm: str, seed: int = 0) -> dict[str, Any]:
    return read_json(root / "boom" / arm / f"seed{seed}" / "results.json")


def test_arms_of_the_card() -> None:
    experiment = build(Setting(SPEC, "tiny", ()))
    found = {arm.name: arm for arm in experiment.arms}
    controls = {"bls_3", "soup", "last_checkpoints", "ensemble", "interpolated_50", "m60"}  # card section 5
    schedules = {"bls", "by_set", "by_set_reversed", "by_task", "two_stage", "mixed"}
    updates = {"old", "update", "updated", "naive", "with_core", "updated_twice", "updated_by_count"}
    ways = {f"merged_tasks_{way}" for way in ("slerp", "multislerp", "karcher", "task_arithmetic", "ties", "sce",
                                              "model_stock")}  # fmt: skip
    ratios = {"boom", "boom_40_100", "boom_80_100", "boom_60", "half_and_rest"}
    wanted = controls | schedules | updates | ways | ratios | {"merged_sets", "merged_clusters"}
    assert wanted <= found.keys()
    assert {"bls", "boom", "boom_80_100", "bls_3", "by_set", "updated", "naive"} <= {n for n in found if found[n].main}
    assert found["boom"].needs == ("base", "m20", "m40", "m60", "m80", "bls")  # the full run is the last member
    assert MEMBERS["half"][1] == MEMBERS["rest"][1]
    assert SPEC.seeds == (0, 1, 2, 3, 4)


def test_other_data_has_late_rows_and_columns_of_its_own(tmp_path: Path) -> None:
    for name in ("cranfield.v1", "cranfield.v2"):
        (tmp_path / name).mkdir()
    (tmp_path / "med.jsonl").write_text(json.dumps({"query": "a", "pos": ["b"], "type": "sts"}))
    paths = ",".join(str(tmp_path / name) for name in ("cranfield.v1", "cranfield.v2", "med.jsonl"))
    experiment = build(Setting(SPEC, "tiny", (f"--data.path=[{paths}]",)))
    assert experiment.table_metrics[-3:] == ("task/cranfield.v1", "task/cranfield.v2", "task/med")
    assert "--data.new=0.1" in experiment.fingerprint
    names = {arm.name for arm in experiment.arms}
    assert "updated_twice" not in names  # a share arrives at once
    assert {"by_task", "two_stage", "merged_tasks_slerp"} <= names


def test_arms_that_repeat_another_are_left_out_and_told() -> None:
    every = build(Setting(SPEC, "tiny", ()))
    one_type = build(Setting(SPEC, "tiny", ("--data.types=[retrieval]", "--data.new=0.1")))
    gone = {arm.name for arm in every.arms} - {arm.name for arm in one_type.arms}
    assert {"by_task", "two_stage", "tasks", "merged_tasks_model_stock"} < gone
    assert not {"by_set", "merged_sets", "merged_clusters"} & gone
    assert any("left out, as BLS is the same where all sets are of one task type (retrieval)" in note
               for note in one_type.notes)  # fmt: skip
    two = build(Setting(SPEC, "tiny", ("--data.types=[sts,clustering]", "--data.new=0.1")))
    assert {arm.name for arm in every.arms} - {arm.name for arm in two.arms} == {
        "two_stage", "first_update", "second_update", "updated_twice", "updated_by_count"
    }  # fmt: skip
    assert two.notes[-1] == "two_stage: left out, as BLS is the same without a set of type retrieval."
    assert len(every.notes) == len(two.notes) - 1


def flags_of(monkeypatch: pytest.MonkeyPatch, arm: str, *flags: str) -> list[str]:
    """What an arm adds to the flags of the fit."""
    found: dict[str, list[str]] = {}

    def noted(setting: Setting, one: Trained, needs: tuple[str, ...], bag: Any) -> Arm:
        found[one.name] = [*one.flags]
        return trained_arm(setting, one, needs, bag)

    monkeypatch.setattr(arms, "trained_arm", noted)
    build(Setting(SPEC, "tiny", flags))
    return found[arm]


def test_the_longer_run_is_three_times_the_users(monkeypatch: pytest.MonkeyPatch) -> None:
    assert flags_of(monkeypatch, "bls_3") == ["--trainer.max_epochs=3"]
    assert flags_of(monkeypatch, "bls_3", "--trainer.max_epochs=2", "--trainer.max_steps=50") == [
        "--trainer.max_epochs=6", "--trainer.max_steps=150"
    ]  # fmt: skip
    assert flags_of(monkeypatch, "bls_3", "--trainer.max_epochs=-1", "--trainer.max_steps=5") == [
        "--trainer.max_steps=15"
    ]


def test_what_the_user_leaves_out_stays_out_of_the_first_update(monkeypatch: pytest.MonkeyPatch) -> None:
    flags = flags_of(monkeypatch, "first_update", "--data.leave_out=[travel-retrieval,workshop-retrieval]")
    assert '--data.leave_out=["workshop-clustering", "workshop-retrieval", "travel-retrieval"]' in flags


def test_names_of_sets_may_look_like_numbers(tmp_path: Path) -> None:
    for name in ("2020", "a, b", "yes"):
        (tmp_path / f"{name}.jsonl").write_text("\n".join(json.dumps({"query": q, "pos": [q * 2]}) for q in "abcd"))
    flag = names_flag("train_on", ["2020", "a, b"])
    data = data_of(Setting(SPEC, "tiny", (f"--data.path={tmp_path}", "--data.negatives=0", flag)))
    data.setup("fit")
    assert data.training_sets() == {name: {"type": "retrieval", "rows": 2} for name in ("2020", "a, b")}


def test_a_preset_is_trained_on_built_in_sets_whatever_the_users(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.jsonl").write_text("{}")
    users = (f"--data.path={tmp_path}", "--data.held_out=[own]", "--data.task_instructions={own: Do}",
             "--data.part=new", "--data.new=0.5", "--data.leave_out=[own]")  # fmt: skip
    fitted: list[str] = []

    def fit(setting: Setting, folder: Path, seed: int, flags: list[str], stage: str) -> dict[str, float]:
        fitted.extend(flags)
        return {"steps": 0.0, "tokens": 0.0}

    monkeypatch.setattr(training, "fit", fit)
    monkeypatch.setattr(training, "evaluate", lambda *args: None)
    setting = Setting(SPEC, "smoke", users)
    training.base_arm(setting).run(ArmContext("boom", "smoke", "base", 0, tmp_path, Clock(tmp_path)))
    data = data_of(replace(setting, flags=(*users, *fitted)))
    data.setup("fit")
    assert set(data.training_sets()) == {f"{name}-base" for name in DOMAINS}


def test_a_folders_sets_are_of_one_task() -> None:
    domains = {"med": "in", "cisi": "in", "court": "out"}
    groups = groups_of_tasks(domains, ["med/title"])
    assert groups["new_tasks"] == ["med"]
    assert groups["old_tasks"] == ["cisi"]
    assert (groups["in_domain"], groups["out_of_domain"]) == (["med", "cisi"], ["court"])
    assert "new_tasks" not in groups_of_tasks(domains, [])


def test_the_cosine_of_vectors_side_by_side_is_the_mean_of_cosines() -> None:
    generator = torch.Generator().manual_seed(0)
    members = [torch.randn(6, width, generator=generator) * width for width in (4, 7, 3)]
    joined = torch.nn.functional.normalize(side_by_side(members), dim=1)
    cosines = [torch.nn.functional.normalize(part, dim=1) @ torch.nn.functional.normalize(part, dim=1).T
               for part in members]  # fmt: skip
    torch.testing.assert_close(joined @ joined.T, torch.stack(cosines).mean(0))


def test_quantised_members_are_refused() -> None:
    with pytest.raises(InputError, match="field 'quantization': members are merged whole, which weights in int8"):
        build(Setting(SPEC, "tiny", ("--model.quantization=int8",)))


def test_an_order_for_all_arms_is_refused() -> None:
    with pytest.raises(InputError, match="field 'order': the arms differ in it, and most have none"):
        build(Setting(SPEC, "tiny", ("--data.order=[a,b]",)))


@pytest.mark.slow
def test_a_backbone_of_the_users_is_the_base(tmp_path: Path) -> None:
    """The folder holds a language model, whose tensors have other names than those of the members' exports."""
    from transformers import Qwen3ForCausalLM

    Qwen3ForCausalLM(preset_config("nano-qwen3", num_hidden_layers=1)).save_pretrained(tmp_path / "own")
    preset_tokenizer("nano-qwen3").save_pretrained(tmp_path / "own")
    command = ["--arms", "interpolated_75", "--seeds", "0", *SMOKE, THREE, f"--model.backbone={tmp_path / 'own'}"]
    assert boom([*command, "--runs_dir", str(tmp_path)]) == 0
    base, bls, merged = (
        load_file(tmp_path / "boom" / place / "model.safetensors")
        for place in ("base/seed0/export", "bls/seed0/export", "interpolated_75/seed0/merged")
    )
    own = load_file(tmp_path / "own" / "model.safetensors")
    assert base.keys() == {name.removeprefix("model.") for name in own} != own.keys()
    assert all(torch.equal(base[name.removeprefix("model.")], own[name]) for name in own)
    assert all(torch.allclose(merged[name], 0.75 * bls[name] + 0.25 * base[name], atol=1e-6) for name in base)
    assert results(tmp_path, "interpolated_75")["metrics"]["drift"] > 0
    assert results(tmp_path, "base")["metrics"]["cost"] == 0


@pytest.mark.slow
def test_members_are_merged_and_told_with_their_cost(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--arms", "boom_80_100", "last_checkpoints", "updated", "--seeds", "0", *SMOKE, THREE,
               "--data.new=[workshop-retrieval]", "--runs_dir", str(tmp_path)]  # fmt: skip
    assert boom(command) == 0
    seed = tmp_path / "boom"
    states = [load_file(seed / arm / "seed0" / "export" / "model.safetensors") for arm in ("m80", "bls")]
    merged = load_file(seed / "boom_80_100" / "seed0" / "merged" / "model.safetensors")
    expected = merge(states, "multislerp", size_weights([80, 100]))
    assert all(torch.allclose(merged[name], expected[name], atol=1e-6) for name in expected)
    found = results(tmp_path, "boom_80_100")
    assert found["metrics"]["cost"] == 1.8
    assert 0 < found["metrics"]["from_linear"] < 1
    assert len(found["per_item"]["in_domain"]) == 8
    assert len(found["per_item"]["out_of_domain"]) == 12

    record = read_json(seed / "m80" / "seed0" / "fit" / "member.json")
    assert record["bag"]["ratio"] == 80
    assert all(of["drawn"] == sample_size(of["rows"], 80) for of in record["datasets"].values())
    sets = read_json(seed / "update" / "seed0" / "sets.json")
    old = sum(of["rows"] for name, of in sets.items() if name != "workshop-retrieval")
    core = sum(sample_size(of["rows"], 40) for name, of in sets.items() if name != "workshop-retrieval")
    new = sets["workshop-retrieval"]["rows"]
    assert results(tmp_path, "updated")["metrics"]["cost"] == pytest.approx((new + core) / (old + new))
    assert set(results(tmp_path, "updated")["per_item"]["new_tasks"]) == {"workshop-retrieval"}

    report = json.loads((seed / "report.json").read_text())
    assert {"base", "bls", "m80", "boom_80_100", "updated"} <= {arm["name"] for arm in report["arms"]}
    assert (seed / "In-domain_against_out-of-domain.png").is_file()
    assert (seed / "What_an_update_keeps_and_learns.png").is_file()
    assert (seed / "Drift_by_layer.png").is_file()
    assert boom(command) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_sets_follow_one_another_in_both_orders(tmp_path: Path) -> None:
    command = ["--arms", "by_set", "by_set_reversed", "--seeds", "0", *SMOKE, THREE, "--runs_dir", str(tmp_path)]
    assert boom(command) == 0
    config = yaml.safe_load((tmp_path / "boom" / "by_set_reversed" / "seed0" / "fit" / "config.yaml").read_text())
    assert config["data"]["order"] == ["workshop-retrieval", "household-sts", "travel-classification"]
    assert config["data"]["schedule"] == "dataset"
    weights = [load_file(tmp_path / "boom" / arm / "seed0" / "export" / "model.safetensors")
               for arm in ("by_set", "by_set_reversed")]  # fmt: skip
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_sets_are_clustered_by_what_they_gain(tmp_path: Path) -> None:
    """Three sets in three clusters: each by itself, so that the clusters' models are those of single sets."""
    command = ["--arms", "merged_clusters", "--seeds", "0", *SMOKE, THREE, "--runs_dir", str(tmp_path)]
    assert boom(command) == 0
    folder = tmp_path / "boom" / "gains" / "seed0"
    record = read_json(folder / "gains.json")
    assert len(record["names"]) == 3
    alone, joint = {}, {}
    for name in record["names"]:
        alone[name] = read_json(folder / name / "losses.json")["losses"][name]
        for other in record["names"]:
            if (folder / f"{name}+{other}").exists():
                losses = read_json(folder / f"{name}+{other}" / "losses.json")["losses"]
                joint[name, other] = losses[name], losses[other]
    for (first, second), (a, b) in joint.items():
        gain = ((alone[first] - a) / alone[first] + (alone[second] - b) / alone[second]) / 2
        row, column = record["names"].index(first), record["names"].index(second)
        assert record["gains"][row][column] == pytest.approx(gain)
    assert sorted(read_json(folder / "clusters.json").values()) == sorted([name] for name in record["names"])
    assert (tmp_path / "boom" / "Gains_of_pairs_of_sets.png").is_file()
    rows = [of["rows"] for of in read_json(folder / "sets.json").values()]
    measured = 9 * 32  # each set alone and in two pairs, with 40 rows less 20 %
    cost = results(tmp_path, "merged_clusters")["metrics"]["cost"]
    assert cost == pytest.approx(1 + measured / sum(rows))


@pytest.mark.slow
def test_a_killed_member_goes_on(tmp_path: Path) -> None:
    args = ["--arms", "m80", "--seeds", "0", *SMOKE, THREE, "--trainer.max_steps=12", "--runs_dir"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    command = [sys.executable, "-m", "experiments.boom", *args, str(killed)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **silent)
    member = killed / "boom" / "m80" / "seed0"
    deadline = time.monotonic() + 240
    while not (member / "fit" / "last.ckpt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (member / "fit" / "last.ckpt").exists()
    assert not (member / "export").exists()
    for folder in (killed, whole):
        assert boom([*args, str(folder)]) == 0
    assert results(killed, "m80")["metrics"] == results(whole, "m80")["metrics"]
    weights = [load_file(f / "boom" / "m80" / "seed0" / "export" / "model.safetensors") for f in (killed, whole)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data.bag.ratio=0"], "above 0, at most 100, got 0"),
        (["--data.bag.ratio=120"], "above 0, at most 100, got 120"),
        (["--data.part=new", "--data.new=[nothing]"], "no training set 'nothing'"),
        (["--data.train_on=[nothing]"], "no training set 'nothing'"),
        (["--data.schedule=dataset", "--data.order=[travel-retrieval]"], "must name each dataset once"),
        (["--data.schedule=mixed", "--data.order=[travel-retrieval]"], "the schedule 'mixed' has no order"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["fit", "--scale", "smoke", "--trainer.enable_progress_bar=false", *flags]
    assert boom([*args, "--trainer.default_root_dir", str(tmp_path)]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert message in errors[-1]


@pytest.mark.slow
def test_an_empty_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    args = ["fit", "--scale", "smoke", "--trainer.enable_progress_bar=false", f"--data.path={tmp_path / 'empty.jsonl'}"]
    assert boom([*args, "--trainer.default_root_dir", str(tmp_path / "run")]) == 2
    assert "empty.jsonl" in capsys.readouterr().err


@pytest.mark.slow
def test_three_real_collections(shared_data: Path, tmp_path: Path) -> None:
    """BLS and its merges over collections of different size; the numbers of each collection are in the table."""
    folders = [str(part_of(shared_data / name, tmp_path / name, 300)) for name in ("cranfield", "med", "cisi")]
    flags = [f"--data.path=[{','.join(folders)}]", "--data.negatives=0", "--data.batch_size=8"]
    command = ["--arms", "bls", "half_and_rest", "boom_80_100", "--seeds", "0", *SMOKE, *flags]
    assert boom([*command, "--runs_dir", str(tmp_path / "runs")]) == 0
    for arm in ("bls", "half_and_rest", "boom_80_100"):
        found = results(tmp_path / "runs", arm)["metrics"]
        assert all(0 < found[f"task/{name}"] <= 1 for name in ("cranfield", "med", "cisi"))
    assert "task/cisi" in (tmp_path / "runs" / "boom" / "report.md").read_text()


def test_many_points_have_numbers_and_a_list_of_names() -> None:
    few = {f"arm{n}": {"in_domain": n / 40, "out_of_domain": n / 50, "cost": 1.0} for n in range(5)}
    many = {f"arm{n}": {"in_domain": n / 40, "out_of_domain": n / 50, "cost": 1.0} for n in range(30)}
    texts = [[text.get_text() for text in domains(means).axes[0].texts] for means in (few, many)]
    assert texts[0] == list(few)
    assert texts[1][:30] == [str(n) for n in range(1, 31)]
    assert "\n".join(texts[1][30:]).splitlines() == [f"{n + 1}  arm{n}" for n in range(30)]
