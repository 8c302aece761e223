"""The reward model's command line: reproduce, fit, resume, export, real data, mistakes."""

import json
from pathlib import Path

import pytest
import torch

from experiments.reward_model.__main__ import main as reward_model

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SMALL = ("--scale", "smoke", "--data.tasks.count=80")


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


@pytest.mark.parametrize("scale", ["smoke", "tiny", "paper"])
def test_every_configuration_parses_and_prints(capsys: pytest.CaptureFixture[str], scale: str) -> None:
    with pytest.raises(SystemExit) as stop:
        reward_model(["fit", "--scale", scale, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert "centre: 0.01" in printed
    assert ("Qwen2.5-1.5B" in printed) == (scale == "paper")


def test_mistakes_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"chosen": "a b", "rejected": "a c"}\n{"chosen": "a b"}\n')
    place = ["--trainer.default_root_dir", str(tmp_path / "run")]
    for flags, words in (
        (["--data.path", str(broken)], "broken.jsonl:2: field 'rejected': the field is missing"),
        (["--data.path", str(tmp_path)], "broken.jsonl:2"),
        (["--data.path", "no/such.jsonl"], "no/such.jsonl: file not found"),
        (["--model.centre=-1"], "field 'centre': must be 0 or more"),
        (["--model.max_length=5000"], "field 'max_length': must lie between 1 and 1024"),
        (["--model.backbone=none"], "backbone 'none' is none of the presets"),
        (["--data.tasks.count=1"], "tasks.count"),
    ):
        assert reward_model(["fit", *SMALL[:2], *QUIET, *place, *flags]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert words in line


@pytest.mark.slow
def test_fit_resume_test_export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, parts, folder = tmp_path / "whole", tmp_path / "parts", tmp_path / "folder"
    flat = ["--model.schedule.name=constant", "--model.schedule.warmup_ratio=0"]  # the same with fewer steps
    common = ["fit", *SMALL, *QUIET, *flat, "--model.backbone=tiny-bert"]
    assert reward_model([*common, "--trainer.max_steps=11", "--trainer.default_root_dir", str(whole)]) == 0
    assert reward_model([*common, "--trainer.max_steps=5", "--trainer.default_root_dir", str(parts)]) == 0
    more = ["--trainer.max_steps=11", "--trainer.default_root_dir", str(parts), "--ckpt_path", "last"]
    assert reward_model(["fit", *SMALL, *QUIET, *more]) == 0
    expected, resumed = weights(whole / "last.ckpt"), weights(parts / "last.ckpt")
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(value, resumed[name]) for name, value in expected.items())

    results = json.loads((whole / "results.json").read_text())["metrics"]
    assert f"{results['accuracy']:.4f}" in capsys.readouterr().out
    checkpoint = ["--ckpt_path", str(whole / "last.ckpt")]
    assert reward_model(["export", *checkpoint, "--output", str(folder)]) == 0
    place = ["--trainer.default_root_dir", str(tmp_path / "again")]
    assert reward_model(["test", *SMALL, *QUIET, *place, "--model.backbone", str(folder)]) == 0
    again = json.loads((tmp_path / "again" / "results.json").read_text())["metrics"]
    assert again == pytest.approx(results, abs=1e-5)
    assert reward_model(["predict", *SMALL, *QUIET, *checkpoint, *place]) == 0
    assert (tmp_path / "again" / "rewards.jsonl").read_text() == (whole / "rewards.jsonl").read_text()


@pytest.mark.slow
def test_reproduce(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SMALL, *QUIET[:1], "--seeds", "0", "1", "--arms", "all", "--runs_dir", str(tmp_path)]
    assert reward_model(command) == 0
    report = json.loads((tmp_path / "reward_model" / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert arms.keys() == {"chance", "length", "words", "reward_model", "not_centred", "bidirectional"}
    assert arms["chance"]["metrics"]["accuracy"]["mean"] == 0.5
    assert len(report["claims"]) == 4
    assert arms["reward_model"]["cost"]["steps"] == 6
    assert reward_model(command) == 0
    assert "already done" in capsys.readouterr().out


@pytest.mark.slow
def test_fit_on_real_preferences(shared_data: Path, tmp_path: Path) -> None:
    data = ["--data.path", str(shared_data / "hh_rlhf"), "--data.test_share=0.03", "--data.val_share=0.01"]
    assert reward_model(["fit", *SMALL[:2], *QUIET, *data, "--trainer.default_root_dir", str(tmp_path)]) == 0
    results = json.loads((tmp_path / "results.json").read_text())
    assert 0.2 < results["metrics"]["accuracy"] < 0.8
    assert all(name.startswith("harmless_test_half:") for name in results["per_item"]["accuracy"])
