"""Policies trained on several domains, by the command line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments.grpo import SPEC as GRPO
from experiments.sft import SPEC as SFT
from lit_core.cli import Spec, main

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")
CONFIG = """
model: {backbone: nano-qwen3, max_tokens: 8}
data:
  domains:
    math: {task: sums, held_out: 4, small: {count: 40}}
    chat: {task: chat_words, held_out: 4, small: {count: 40}}
    if: {task: constraints, held_out: 4, small: {count: 40}}
  batch_size: 6
trainer: {max_steps: 2, val_check_interval: 1, check_val_every_n_epoch: null}
"""


def spec(original: Spec, folder: Path) -> Spec:
    text = CONFIG.replace("max_tokens: 8", "rollout: {samples: 4, max_tokens: 8}") if original is GRPO else CONFIG
    (folder / "paper.yaml").write_text(text)
    return replace(original, data="lit_rl.data.domains:DomainDataModule", folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize("original", [SFT, GRPO], ids=["sft", "grpo"])
def test_every_domain_is_trained_and_reported(tmp_path: Path, original: Spec) -> None:
    run = tmp_path / "run"
    flags = ["--data.domains.math.share=2", "--trainer.default_root_dir", str(run)]
    assert main(spec(original, tmp_path), ["fit", *QUIET, *flags]) == 0
    curves = json.loads((run / "curves.json").read_text())
    for domain in ("math", "chat", "if"):
        for metric in ("reward", "success", "entropy", "length"):
            assert [step for step, _ in curves[f"val/{domain}/{metric}"]] == [1, 2]
    assert {"val/domain_mean/reward", "val/domain_worst/success"} <= set(curves)
    results = json.loads((run / "results.json").read_text())
    assert len(results["per_item"]["reward"]) == 12
    assert len(results["per_item"]["chat/reward"]) == 4
    rows = [json.loads(line) for line in (run / "responses.jsonl").read_text().splitlines()]
    assert {row["domain"] for row in rows} == {"math", "chat", "if"}
    assert "share: 2.0" in (run / "config.yaml").read_text()


@pytest.mark.parametrize(
    ("flag", "told"),
    [
        ("--data.domains.math.share=0", "must be above 0, got 0"),
        ("--data.domains.math.task=law", "field 'math.task'"),
        ("--data.quotas=some", "quotas"),
        ("--data.batch_size=2", "which is none of a batch of 2"),
        ("--data.path=nowhere.jsonl", "nowhere.jsonl"),
    ],
)
def test_mistakes_are_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path, flag: str, told: str) -> None:
    place: Any = ["--trainer.default_root_dir", str(tmp_path / "run")]
    assert main(spec(SFT, tmp_path), ["fit", *QUIET, *place, flag]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert told in error
