"""Verbs end to end on the smallest runs: fit in stages, resume, test, predict, export, reproduce, restart."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from experiments.__main__ import summaries
from experiments.dense import SPEC
from experiments.dense.__main__ import main as dense
from experiments.llm_ql.__main__ import main as llm_ql
from lit_core.stages import ExperimentCLI
from lit_embed.data.world import WorldConfig, build_world

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SMALL = ("--scale", "smoke", "--data.world.documents=120", "--data.world.train_questions=100", "--data.batch_size=8",
         "--data.world.dev_questions=10", "--data.world.test_questions=12")  # fmt: skip
ROOT = Path(__file__).parents[2]


def weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return torch.load(checkpoint, weights_only=True)["state_dict"]


def test_every_experiment_has_a_summary_and_a_quick_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert {"dense", "llm_ql"} <= summaries().keys()
    assert all(summaries().values())
    assert llm_ql(["--help"]) == 0
    assert "--stage NAME" in capsys.readouterr().out


@pytest.mark.parametrize("scale", ["smoke", "tiny", "paper"])
@pytest.mark.parametrize("stage", ["query_likelihood", "contrastive"])
def test_every_configuration_parses_and_prints(capsys: pytest.CaptureFixture[str], scale: str, stage: str) -> None:
    with pytest.raises(SystemExit) as stop:
        llm_ql(["fit", "--scale", scale, "--stage", stage, "--print_config"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    assert f"stage: {stage}" in printed
    assert ("Llama-2-7b" in printed) == (scale == "paper")


@pytest.mark.slow
def test_llm_ql_fits_in_stages_and_everything_downstream_works(tmp_path: Path) -> None:
    run = tmp_path / "run"
    common = [*SMALL, *QUIET, "--trainer.default_root_dir", str(run)]
    assert llm_ql(["fit", *common, "--trainer.max_steps=2"]) == 0
    for stage in ("query_likelihood", "contrastive"):
        assert (run / stage / "last.ckpt").is_file()
        assert (run / stage / "config.yaml").is_file()
        assert list((run / stage / "tensorboard").glob("events.*"))
    exported = run / "query_likelihood" / "export"
    assert f"backbone: {exported}" in (run / "contrastive" / "config.yaml").read_text()

    checkpoint = run / "contrastive" / "last.ckpt"
    out = tmp_path / "out"
    data = [*SMALL, *QUIET, "--trainer.default_root_dir", str(out), "--ckpt_path", str(checkpoint)]
    assert llm_ql(["test", *data]) == 0
    fitted = json.loads((run / "contrastive" / "results.json").read_text())["metrics"]
    assert json.loads((out / "results.json").read_text())["metrics"] == pytest.approx(fitted)
    assert llm_ql(["predict", *data]) == 0
    vectors = load_file(out / "corpus.safetensors")["vectors"]
    ids = json.loads((out / "corpus.ids.json").read_text())
    sizes = {"documents": 120, "train_questions": 100, "dev_questions": 10, "test_questions": 12}
    world = build_world(WorldConfig(**sizes, keywords=1.0, multi_hop=0.0, facts=3, distractors=0.0))
    unseen = {d for d, facts in world.documents.items() if world.entities[facts.entity].split != "train"}
    assert set(ids) == unseen
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(ids)))

    assert llm_ql(["export", "--ckpt_path", str(checkpoint), "--output", str(tmp_path / "folder")]) == 0
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(tmp_path / "folder"), device="cpu")
    assert model.encode_query(["a red thing"]).shape == (1, vectors.shape[1])


@pytest.mark.slow
def test_a_fit_in_stages_that_was_cut_off_goes_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    place = [*SMALL, *QUIET, "--trainer.default_root_dir", str(run)]
    assert llm_ql(["fit", *place, "--trainer.max_steps=2"]) == 0
    expected = weights(run / "contrastive" / "last.ckpt")
    for lost in ("end of the second stage", "second stage", "export and second stage"):
        if lost == "end of the second stage":
            (run / "contrastive" / "results.json").unlink()
        else:
            shutil.rmtree(run / "contrastive")
        if lost == "export and second stage":
            shutil.rmtree(run / "query_likelihood" / "export")
        assert llm_ql(["fit", *place, "--trainer.max_steps=2", "--ckpt_path", "last"]) == 0, lost
        assert (run / "contrastive" / "results.json").is_file(), lost
        found = weights(run / "contrastive" / "last.ckpt")
        assert found.keys() == expected.keys(), lost
        for name, value in found.items():
            assert torch.equal(value, expected[name]), (lost, name)


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_a_quantised_backbone_goes_through_both_stages_and_resumes(tmp_path: Path, quantization: str) -> None:
    flags = [*SMALL, *QUIET, "--trainer.default_root_dir", str(tmp_path)]
    model = [f"--model.quantization={quantization}", "--model.lora.r=4"]
    assert llm_ql(["fit", *flags, *model, "--trainer.max_steps=2"]) == 0
    assert (tmp_path / "query_likelihood" / "export" / "adapter_config.json").is_file()
    before = weights(tmp_path / "contrastive" / "last.ckpt")
    assert before
    assert all("lora" in name for name in before)
    assert llm_ql(["fit", *flags, "--ckpt_path", "last", "--trainer.max_steps=3"]) == 0
    assert any(
        not torch.equal(value, before[name]) for name, value in weights(tmp_path / "contrastive" / "last.ckpt").items()
    )


@pytest.mark.slow
def test_a_stage_named_by_its_setting_runs_alone(tmp_path: Path) -> None:
    place = ["--trainer.default_root_dir", str(tmp_path), "--trainer.max_steps=1"]
    assert llm_ql(["fit", *SMALL, *QUIET, *place, "--model.stage", "contrastive", "--model.attention_block=true"]) == 0
    assert (tmp_path / "contrastive" / "last.ckpt").is_file()
    assert not (tmp_path / "query_likelihood").exists()


@pytest.mark.slow
@pytest.mark.parametrize("grad_cache", ["false", "true"])
def test_a_fit_resumed_in_mid_epoch_ends_with_the_same_weights(tmp_path: Path, grad_cache: str) -> None:
    adapters = ["--model.lora.r=4", "--model.lora.dropout=0.2"]  # dropout: the draws must repeat as well
    flags = [*SMALL, *QUIET, "--trainer.val_check_interval=4"]
    model = [*adapters, f"--model.grad_cache={grad_cache}", "--model.schedule.name=constant"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert dense(["fit", *flags, *model, "--trainer.max_steps=7", "--trainer.default_root_dir", str(whole)]) == 0
    assert dense(["fit", *flags, *model, "--trainer.max_steps=5", "--trainer.default_root_dir", str(parts)]) == 0
    more = ["--trainer.max_steps=7", "--trainer.default_root_dir", str(parts), "--ckpt_path", "last"]
    assert dense(["fit", *flags, *more]) == 0
    expected, resumed = weights(whole / "last.ckpt"), weights(parts / "last.ckpt")
    assert expected.keys() == resumed.keys()
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


@pytest.mark.slow
def test_reproduce_killed_and_started_again_ends_with_the_same_numbers(tmp_path: Path) -> None:
    args = [*SMALL, "--seeds", "0", "--trainer.enable_progress_bar=false", "--runs_dir"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    undisturbed, killed = tmp_path / "undisturbed", tmp_path / "killed"
    assert llm_ql([*args, str(undisturbed)]) == 0

    command = [sys.executable, "-m", "experiments.llm_ql", *args, str(killed)]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **silent)
    waited = killed / "llm_ql" / "contrastive_equal" / "seed0" / "contrastive" / "last.ckpt"
    deadline = time.monotonic() + 120
    while not waited.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert waited.exists()
    assert not (waited.parents[1] / "results.json").exists()

    assert llm_ql([*args, str(killed)]) == 0
    reports = [json.loads((folder / "llm_ql" / "report.json").read_text()) for folder in (undisturbed, killed)]
    first, second = ({arm["name"]: arm["metrics"] for arm in report["arms"]} for report in reports)
    assert first == second
    assert reports[0]["claims"] == reports[1]["claims"]
    assert (killed / "llm_ql" / "report.md").is_file()
    assert list((killed / "llm_ql").glob("*.png"))


@pytest.mark.slow
def test_a_sharded_checkpoint_brings_its_settings_along(tmp_path: Path) -> None:
    run, folder = tmp_path / "run", tmp_path / "sharded.ckpt"
    place = ["--trainer.default_root_dir", str(run), "--trainer.max_steps=1"]
    assert dense(["fit", *SMALL, *QUIET, *place, "--model.symmetric=true", "--model.temperature=0.3"]) == 0
    folder.mkdir()
    saved = torch.load(run / "last.ckpt", weights_only=True)
    torch.save({name: value for name, value in saved.items() if name != "state_dict"}, folder / "meta.pt")
    args = ["validate", *SMALL[2:], "--ckpt_path", str(folder)]
    cli = ExperimentCLI(SPEC, args, SPEC.configs("smoke"), tmp_path / "other", quiet=True, execute=False)
    assert (cli.model.loss.symmetric, cli.model.loss.temperature) == (True, 0.3)
