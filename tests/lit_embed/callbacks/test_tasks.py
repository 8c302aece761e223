"""What runs on several tasks leave behind."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_embed.callbacks.tasks import MemberRecord, TaskReport
from lit_embed.data.bagging import manifest
from lit_embed.data.task_datamodule import EncodedTask
from lit_embed.retrieval.tasks import Sts

TASKS = [
    Sts(name=name, domain=domain, queries={"a": "x", "b": "y"}, pairs=[("a", "b", 1.0), ("a", "a", 2.0)])
    for name, domain in (("first", "in"), ("second", "out"), ("third", "out"))
]
SCORES = {"first": {"spearman": 0.5, "pearson": 0.25}, "second": {"spearman": 0.75, "pearson": 1.0}}
MEANS = {"mean_task": 0.625, "in_domain": 0.5}


def member(folder: Path, bag: dict[str, Any], rows: list[int], checkpoint: str | None = None) -> None:
    """Begin a fit on some rows of a set of ten."""
    written = manifest(bag, {"a": np.array(rows)}, {"a": 10}, {"a": "content"})
    trainer: Any = SimpleNamespace(datamodule=SimpleNamespace(manifest=written), ckpt_path=checkpoint)
    MemberRecord(folder).on_fit_start(trainer, None)  # type: ignore[arg-type]


def trainer_of(stage: str) -> Any:
    datamodule = SimpleNamespace(evaluation=lambda asked: [EncodedTask(task, {}, {}) for task in TASKS])
    metrics = {"val/mean_task": torch.tensor(0.625)}
    return SimpleNamespace(datamodule=datamodule, state=SimpleNamespace(fn=stage), callback_metrics=metrics)


def module_of(scores: dict[str, dict[str, float]]) -> Any:
    return SimpleNamespace(task_scores=scores, task_means=MEANS if scores else {})


def test_a_member_says_which_rows_it_was_trained_on(tmp_path: Path) -> None:
    member(tmp_path, {"ratio": 30}, [1, 4, 7])
    found = read_json(tmp_path / "member.json")
    assert found["bag"] == {"ratio": 30}
    assert (found["datasets"]["a"]["rows"], found["datasets"]["a"]["drawn"]) == (10, 3)
    member(tmp_path, {"ratio": 20}, [1, 4])  # a new fit in the folder
    assert read_json(tmp_path / "member.json")["datasets"]["a"]["drawn"] == 2


def test_a_member_goes_on_with_the_same_rows_alone(tmp_path: Path) -> None:
    member(tmp_path, {"ratio": 30}, [1, 4, 7])
    before = read_json(tmp_path / "member.json")
    member(tmp_path, {"ratio": 30}, [1, 4, 7], "last.ckpt")
    with pytest.raises(InputError, match=r"member\.json: this member was begun on other data: datasets/a/ids was"):
        member(tmp_path, {"ratio": 30}, [1, 4, 8], "last.ckpt")
    assert read_json(tmp_path / "member.json") == before
    (tmp_path / "member.json").unlink()
    member(tmp_path, {"ratio": 30}, [1, 4, 8], "last.ckpt")  # into another folder
    assert read_json(tmp_path / "member.json")["datasets"]["a"]["drawn"] == 3


def test_a_test_leaves_all_scores_and_the_main_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    TaskReport(tmp_path).on_test_end(trainer_of("test"), module_of(SCORES))
    assert read_json(tmp_path / "scores.json") == SCORES
    metrics = read_json(tmp_path / "results.json")["metrics"]
    assert metrics == {**MEANS, "first/spearman": 0.5, "second/spearman": 0.75}  # the third was not scored
    printed = capsys.readouterr().out
    assert "test: 2 tasks" in printed
    for words in (("first", "in", "0.5000"), ("second", "out", "0.7500"), ("mean_task", "0.6250")):
        assert any(all(word in line for word in words) for line in printed.splitlines())
    assert "third" not in printed


def test_only_the_verb_validate_leaves_something_of_a_validation(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = TaskReport(tmp_path)
    report.on_validation_end(trainer_of("fit"), module_of(SCORES))
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out
    report.on_validation_end(trainer_of("validate"), module_of(SCORES))
    assert read_json(tmp_path / "validation.json") == {"val/mean_task": 0.625}
    assert "validation: 2 tasks" in capsys.readouterr().out


def test_without_a_score_there_is_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "scores.json", SCORES)
    TaskReport(tmp_path).on_test_end(trainer_of("test"), module_of({}))
    assert read_json(tmp_path / "scores.json") == {}
    assert read_json(tmp_path / "results.json")["metrics"] == {}
    assert not capsys.readouterr().out
