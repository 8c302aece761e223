"""The experiments on policies end to end at the smallest scale."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.grpo.__main__ import main as grpo
from experiments.mgs.__main__ import main as mgs
from experiments.ppo.__main__ import main as ppo
from experiments.rose.__main__ import main as rose
from experiments.sft.__main__ import main as sft
from experiments.tre.__main__ import main as tre

ROOT = Path(__file__).parents[2]
QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
SMOKE = ("--scale", "smoke", *QUIET)


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that imitation has taught a little: some of its answers are right."""
    folder = tmp_path_factory.mktemp("sft")
    steps = ("--trainer.max_steps=150", "--trainer.val_check_interval=150", "--checkpoint.every_n_train_steps=75")
    data = ("--data.batch_size=64", "--data.countdown.count=200", "--data.countdown.least_numbers=2",
            "--data.countdown.most_numbers=2", "--data.held_out=8")  # fmt: skip
    assert sft(["fit", *SMOKE, *steps, *data, "--trainer.default_root_dir", str(folder)]) == 0
    assert sft(["export", "--ckpt_path", str(folder / "last.ckpt"), "--output", str(folder / "export")]) == 0
    return folder / "export"


EASY = (
    *("--data.countdown.least_numbers=2", "--data.countdown.most_numbers=2", "--data.countdown.count=200"),
    "--data.countdown.largest_number=15",
)


@pytest.mark.parametrize("scale", ["smoke", "tiny", "paper"])
@pytest.mark.parametrize("main", [sft, grpo, ppo, tre, rose, mgs])
def test_every_configuration_parses_and_prints(capsys: pytest.CaptureFixture[str], main: Any, scale: str) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--scale", scale, "--print_config"])
    assert stop.value.code == 0
    assert ("Qwen/Qwen" in capsys.readouterr().out) == (scale == "paper")


@pytest.mark.parametrize(
    "preset", sorted((ROOT / "experiments" / "grpo" / "presets").glob("*.yaml")), ids=lambda p: p.stem
)
def test_every_preset_parses(capsys: pytest.CaptureFixture[str], preset: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        grpo(["fit", "--config", str(preset), "--print_config"])
    assert stop.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("main", [grpo, ppo, tre, rose])
def test_fit_leaves_everything_behind(tmp_path: Path, policy: Path, main: Any) -> None:
    run = tmp_path / "run"
    common = (*SMOKE, *EASY, "--trainer.default_root_dir")
    assert main(["fit", *common, str(run), "--model.backbone", str(policy)]) == 0
    for name in ("last.ckpt", "config.yaml", "curves.json", "samples.jsonl", "responses.jsonl", "results.json"):
        assert (run / name).is_file(), name
    curves = json.loads((run / "curves.json").read_text())
    for name in ("val/success", "val/entropy", "val/tail_mass", "val/pass@4"):
        assert [step for step, _ in curves[name]] == [2, 4], name
    assert torch.load(run / "last.ckpt", weights_only=True)["global_step"] == 4
    results = json.loads((run / "results.json").read_text())
    assert len(results["per_item"]["success"]) == 8
    out = tmp_path / "out"
    assert main(["test", *common, str(out), "--ckpt_path", str(run / "last.ckpt")]) == 0
    assert json.loads((out / "results.json").read_text())["metrics"] == results["metrics"]  # the same draws
    assert main(["predict", *common, str(out), "--ckpt_path", str(run / "last.ckpt")]) == 0
    assert len((out / "responses.jsonl").read_text().splitlines()) == 8 * 4
    assert main(["export", "--ckpt_path", str(run / "last.ckpt"), "--output", str(tmp_path / "folder")]) == 0
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "folder")
    state = torch.load(run / "last.ckpt", weights_only=True)["state_dict"]
    torch.testing.assert_close(loaded.model.norm.weight, state["policy.model.model.norm.weight"])
    assert AutoTokenizer.from_pretrained(tmp_path / "folder").eos_token == "<|im_end|>"


@pytest.mark.slow
def test_events_have_the_agreed_names_and_a_table_of_samples(tmp_path: Path, policy: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    flags = ("--trainer.log_every_n_steps=1", "--model.loss.kl_coef=0.01", "--model.update.epochs=2")
    place = ("--trainer.default_root_dir", str(run))
    assert ppo(["fit", *SMOKE, *EASY, *flags, *place, "--model.backbone", str(policy)]) == 0
    events = EventAccumulator(str(run / "tensorboard"))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {"rollout/reward_mean", "rollout/length_mean", "rollout/truncated", "rollout/all_equal", "policy/entropy",
            "policy/approx_kl", "policy/clip_fraction", "policy/grad_norm", "policy/kl", "value/explained_variance",
            "value/loss", "time/rollout_tokens_per_s", "time/update_tokens_per_s"} <= tags  # fmt: skip
    assert [event.step for event in events.Scalars("rollout/reward_mean")][-1] <= 4
    assert {"samples/rollout/text_summary", "samples/val/text_summary"} <= set(events.Tags()["tensors"])


@pytest.mark.slow
def test_a_killed_fit_goes_on_to_the_same_weights(tmp_path: Path, policy: Path) -> None:
    flags = [
        *SMOKE,
        *EASY,
        "--model.backbone",
        str(policy),
        "--trainer.max_steps=40",
        "--trainer.val_check_interval=40",
    ]
    flags += ["--checkpoint.every_n_train_steps=2", "--model.update.mini_batches=2"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert grpo(["fit", *flags, "--trainer.default_root_dir", str(whole)]) == 0
    command = [sys.executable, "-m", "experiments.grpo", "fit", *flags, "--trainer.default_root_dir", str(killed)]
    one_thread = {**os.environ, "OMP_NUM_THREADS": "1"}  # as here: sums of several threads round otherwise
    process = subprocess.Popen(command, cwd=ROOT, env=one_thread, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "last.ckpt").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)  # in a rollout or an update
    process.wait()
    reached = torch.load(killed / "last.ckpt", weights_only=True)["global_step"]
    assert 0 < reached < 40
    assert grpo(["fit", *SMOKE, *EASY, "--trainer.max_steps=40", "--trainer.val_check_interval=40",
                 "--ckpt_path", str(killed / "last.ckpt"), "--trainer.default_root_dir", str(killed)]) == 0  # fmt: skip
    one, other = (torch.load(run / "last.ckpt", weights_only=True)["state_dict"] for run in (whole, killed))
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=0)


@pytest.mark.slow
def test_reproduce_goes_on_after_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    args = ["--scale", "smoke", "--seeds", "0", "1", *QUIET]
    apart = [*args, "--jobs", "2", "--runs_dir", str(tmp_path / "killed")]
    command = [sys.executable, "-m", "experiments.grpo", *apart]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    first = tmp_path / "killed" / "grpo" / "sft" / "seed0" / "results.json"
    deadline = time.monotonic() + 120
    while not first.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "killed" / "grpo" / "report.md").exists()
    assert grpo(apart) == 0
    assert grpo([*args, "--jobs", "1", "--runs_dir", str(tmp_path / "whole")]) == 0  # in this process
    one, other = (json.loads((tmp_path / name / "grpo" / "report.json").read_text()) for name in ("killed", "whole"))
    assert [arm["metrics"] for arm in one["arms"]] == [arm["metrics"] for arm in other["arms"]]
    assert {arm["name"] for arm in one["arms"]} == {"sft", "grpo"}


@pytest.mark.slow
def test_tre_reproduces_with_its_tabular_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    assert tre(["--scale", "smoke", "--seeds", "0", "--runs_dir", str(tmp_path), *QUIET]) == 0
    report = json.loads((tmp_path / "tre" / "report.json").read_text())
    arms = {arm["name"]: arm for arm in report["arms"]}
    assert list(arms) == ["sft", "none", "entropy", "tre_k", "tre_p"]
    assert arms["tre_k"]["metrics"]["coefficient"]["mean"] == 0.01
    assert (tmp_path / "tre" / "tabular" / "seed0" / "tabular.md").is_file()
    assert any("tabular" in note for note in report["notes"])


@pytest.mark.slow
def test_a_trained_reward_model_serves_ppo(tmp_path: Path, policy: Path) -> None:
    from experiments.reward_model.__main__ import main as reward_model

    judge, run = tmp_path / "judge", tmp_path / "run"
    assert reward_model(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path / "fit")]) == 0
    assert reward_model(["export", "--ckpt_path", str(tmp_path / "fit" / "last.ckpt"), "--output", str(judge)]) == 0
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Say {word}."}) + "\n" for word in "abcdefghijklmnopqrst"))
    flags = ["--data.path", str(prompts), "--data.task=preference", "--model.reward_model", str(judge)]
    place = ["--trainer.default_root_dir", str(run), "--model.backbone", str(policy)]
    assert ppo(["fit", *SMOKE, *flags, *place]) == 0
    rewards = {json.loads(line)["reward"] for line in (run / "samples.jsonl").read_text().splitlines()}
    assert len(rewards) > 4  # not verified as right or wrong, but scored
    assert ppo(["fit", *SMOKE, *flags[:3], *place[2:], "--trainer.default_root_dir", str(tmp_path / "none")]) == 2


@pytest.mark.slow
def test_gsm8k_trains_a_folder_with_its_chat_template(tmp_path: Path, shared_data: Path) -> None:
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from lit_core.presets import preset_tokenizer

    tokenizer: Any = preset_tokenizer("tiny-qwen3")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = Qwen2Config(vocab_size=4096, num_key_value_heads=2, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
                         pad_token_id=tokenizer.pad_token_id, tie_word_embeddings=True, **sizes)  # fmt: skip
    folder, run = tmp_path / "model", tmp_path / "run"
    Qwen2ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    flags = ["--data.path", str(shared_data / "gsm8k" / "train.jsonl"), "--data.task=math", "--data.limit=50",
             "--model.rollout.max_tokens=16", "--model.loss.kl_coef=0.01", "--model.evaluation.samples=1",
             "--trainer.limit_val_batches=1", "--trainer.limit_test_batches=1", "--data.eval_batch_size=4"]  # fmt: skip
    place = ["--trainer.default_root_dir", str(run)]
    assert grpo(["fit", *SMOKE, *flags, *place, "--model.backbone", str(folder)]) == 0
    shown = json.loads((run / "samples.jsonl").read_text().splitlines()[0])
    assert "boxed" in shown["prompt"]
    curves = json.loads((run / "curves.json").read_text())
    assert curves["val/success"][-1][0] == 4


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--data.task=nonsense"], "field 'task'"),
        (["--data.path=nowhere.jsonl", "--data.task=math"], "nowhere.jsonl"),
        (["--model.rollout.samples=0"], "samples"),
        (["--model.rollout.samples=1"], "at least 2"),
        (["--model.rollout.temperature=0"], "temperature"),
        (["--model.loss.reduction=mean"], "reduction"),
        (["--model.exploration.kind=luck"], "kind"),
        (["--model.loss.kl=k1", "--model.loss.kl_coef=0.1", "--model.loss.kl_in=loss"], "k1 has no gradient"),
        (["--model.backbone=tiny-bert"], "tiny-bert"),
        (["--data.countdown.least_numbers=9"], "countdown.least_numbers"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: list[str], told: str) -> None:
    assert grpo(["fit", *SMOKE, "--trainer.default_root_dir", str(tmp_path), *flags]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
