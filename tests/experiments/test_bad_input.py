"""Every mistake of a user is one line and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from experiments.dense.__main__ import main as dense
from experiments.llm_ql.__main__ import main as llm_ql

Folder = Callable[..., Path]


@pytest.fixture
def beir(tmp_path: Path) -> Folder:
    """Writes a BEIR folder; keyword arguments replace whole files (None leaves one out)."""

    def write(**files: str | None) -> Path:
        words = ["red apple pie recipe", "green pear tart recipe", "blue plum cake recipe", "old grape juice label"]
        rows = [
            {"_id": f"d{i}", "title": words[i % 4], "text": f"{words[i % 4]} number {i} with text"} for i in range(12)
        ]
        content: dict[str, str | None] = {
            "corpus.jsonl": "\n".join(map(json.dumps, rows)),
            "queries.jsonl": "\n".join(json.dumps({"_id": f"q{i}", "text": words[i]}) for i in range(4)),
            "qrels/train.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in range(2)),
            "qrels/test.tsv": "query-id\tcorpus-id\tscore\n" + "".join(f"q{i}\td{i}\t1\n" for i in (2, 3)),
        }
        content |= {
            name.replace("__", "/").replace("_tsv", ".tsv").replace("_jsonl", ".jsonl"): text
            for name, text in files.items()
        }
        folder = tmp_path / "beir"
        for name, text in content.items():
            if text is not None:
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                (folder / name).write_text(text)
        return folder

    return write


def refused(capsys: pytest.CaptureFixture[str], *args: object, main: Callable[..., int] = dense) -> str:
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


FIT = ("fit", "--scale", "smoke", "--trainer.enable_progress_bar=false")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"corpus_jsonl": None}, ["corpus.jsonl"]),
        ({"corpus_jsonl": '{"_id": "d0", "text": "a b"}\n{"_id": "d1", "text": '}, ["corpus.jsonl:2"]),
        ({"corpus_jsonl": '{"_id": "d0", "text": "a b"}\n{"_id": "d0", "text": "c"}'}, ["corpus.jsonl:2", "d0"]),
        ({"corpus_jsonl": ""}, ["corpus.jsonl"]),
        ({"queries_jsonl": '{"_id": "q2", "text": " "}'}, ["queries.jsonl:1", "text"]),
        ({"qrels__test_tsv": "query-id\tcorpus-id\tscore\nq2\td99\t1\n"}, ["test.tsv:2", "d99"]),
        ({"qrels__test_tsv": "query-id\tcorpus-id\tscore\nq9\td1\t1\n"}, ["test.tsv:2", "q9"]),
    ],
)
def test_broken_collections(
    beir: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str], files: dict[str, str | None], expected: list[str]
) -> None:
    folder = beir(**files)
    line = refused(capsys, *FIT, "--data.path", folder, "--trainer.default_root_dir", tmp_path / "run")
    for part in expected:
        assert part in line


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--data.path", "no/such/folder"], "no/such/folder"),
        (["--model.backbone", "no-such-backbone"], "no-such-backbone"),
        (["--model.lora.r=4", "--model.lora.targets=[no_proj]"], "'no_proj' matches no module"),
        (["--model.temperature=-1"], "temperature must be above 0, got -1"),
        (["--trainer.devices", "9999"], "9999"),
        (["--model.encoder.query_prompt=one two three", "--model.encoder.query_length=4"], "query_length must exceed"),
        (["--trainer.precision=bf16-true"], "32-true with --model.loading.dtype bfloat16"),
        (["--model.no_such_flag=1"], "no_such_flag"),
        (["--model.encoder.pooling=median"], "pooling"),
        (["--trainer.max_steps=1e3"], "max_steps"),
        (["--data.batch_size=0"], "batch_size"),
        (["--ckpt_path", "no.ckpt"], "no.ckpt"),
        (["--scale", "huge"], "huge"),
    ],
)
def test_bad_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], flags: list[str], expected: str) -> None:
    args = [arg for arg in FIT if arg not in ("--scale", "smoke")] if "--scale" in flags else FIT
    assert expected in refused(capsys, *args, "--trainer.default_root_dir", tmp_path, *flags)


def test_an_untrained_verb_and_flag_of_reproduce(capsys: pytest.CaptureFixture[str]) -> None:
    assert "unknown verb 'train'" in refused(capsys, "train")
    assert "--seed" in refused(capsys, "--seed", "1")
    assert "unknown arm 'nothing'" in refused(capsys, "--arms", "nothing")
    assert "one device (got 2)" in refused(capsys, "--trainer.devices", "2")
    assert "unknown flag '-x'" in refused(capsys, "-x")


def test_checkpoint_of_another_method_and_flags_beside_a_checkpoint(
    beir: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, run = beir(), tmp_path / "run"
    common = ["--data.path", str(folder), "--trainer.default_root_dir", str(run)]
    assert dense([*FIT, *common, "--trainer.max_steps=1", "--data.batch_size=4"]) == 0
    capsys.readouterr()
    checkpoint = run / "last.ckpt"
    assert "holds an earlier run" in refused(capsys, *FIT, *common)
    line = refused(capsys, "test", *FIT[1:], *common, "--ckpt_path", checkpoint, main=llm_ql)
    assert "written by Dense, not by LLMQL" in line
    line = refused(capsys, "export", "--ckpt_path", checkpoint, "--output", tmp_path / "out", main=llm_ql)
    assert "written by Dense, not by LLMQL" in line
    line = refused(capsys, "test", *FIT[1:], *common, "--ckpt_path", checkpoint, "--model.temperature=1")
    assert "leave out --model.temperature" in line
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    assert "not a checkpoint" in refused(capsys, "test", *common, "--ckpt_path", tmp_path / "text.ckpt")
    assert "not empty" in refused(capsys, "export", "--ckpt_path", checkpoint, "--output", folder)
