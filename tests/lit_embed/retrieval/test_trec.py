import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import pytrec_eval

from lit_core.errors import InputError
from lit_embed.retrieval.evaluate import evaluate
from lit_embed.retrieval.ranking import Qrels, Run
from lit_embed.retrieval.trec import read_qrels, read_run, write_qrels, write_run


def float32(value: float) -> float:
    return struct.unpack("f", struct.pack("f", value))[0]


def random_run(seed: int) -> Run:
    draw = random.Random(seed)
    return {
        f"q{query}": {f"d{doc}": float32(draw.gauss(0, 1)) for doc in draw.sample(range(99), 20)} for query in range(5)
    }


def test_lines_are_ranked_from_one_with_ties_in_order(tmp_path: Path) -> None:
    write_run(tmp_path / "run.trec", {"q1": {"a": 0.5, "c": 0.25, "b": 0.5}, "empty": {}}, tag="bm25")
    assert (tmp_path / "run.trec").read_text() == "q1 Q0 b 1 0.5 bm25\nq1 Q0 a 2 0.5 bm25\nq1 Q0 c 3 0.25 bm25\n"


def test_run_and_qrels_come_back_exactly(tmp_path: Path) -> None:
    run, qrels = random_run(0), {"q0": {"d1": 2, "d2": 0}, "é": {"d3": -1}}
    write_run(tmp_path / "run.trec", run)
    write_qrels(tmp_path / "qrels.trec", qrels)
    assert read_run(tmp_path / "run.trec") == run
    assert read_qrels(tmp_path / "qrels.trec") == qrels


@pytest.fixture
def written(tmp_path: Path) -> tuple[Run, Qrels]:
    run = random_run(1)
    qrels = {query_id: {doc_id: number % 3 for number, doc_id in enumerate(scores)} for query_id, scores in run.items()}
    write_run(tmp_path / "run.trec", run)
    write_qrels(tmp_path / "qrels.trec", qrels)
    return run, qrels


def test_trec_eval_reads_the_files_as_we_do(tmp_path: Path, written: tuple[Run, Qrels]) -> None:
    run, qrels = written
    with (tmp_path / "run.trec").open() as runs, (tmp_path / "qrels.trec").open() as judged:
        evaluator = pytrec_eval.RelevanceEvaluator(pytrec_eval.parse_qrel(judged), {"ndcg_cut.10"})
        theirs = evaluator.evaluate(pytrec_eval.parse_run(runs))
    mean = sum(values["ndcg_cut_10"] for values in theirs.values()) / len(theirs)
    assert evaluate(run, qrels, ["ndcg@10"])["ndcg@10"] == pytest.approx(mean, abs=1e-8)


READ = """
import json, sys
import ranx
run = ranx.Run.from_file(sys.argv[1], kind="trec").to_dict()
qrels = ranx.Qrels.from_file(sys.argv[2], kind="trec").to_dict()
print(json.dumps([run, qrels], default=lambda value: value.item()))
"""


@pytest.mark.slow
def test_ranx_reads_the_files_as_we_do(tmp_path: Path, written: tuple[Run, Qrels]) -> None:
    plain = {**os.environ, "NUMBA_DISABLE_JIT": "1"}  # ranx would compile its readers for 7 to 23 s
    call = [sys.executable, "-W", "ignore", "-c", READ, *(str(tmp_path / f"{name}.trec") for name in ("run", "qrels"))]
    done = subprocess.run(call, env=plain, capture_output=True, text=True, check=True)
    assert tuple(json.loads(done.stdout)) == written


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("q Q0 d 1 0.5", r"run.trec:2: expected 6 fields \(query Q0 document rank score tag\), got 5"),
        ("q Q0 d 1 high tag", r"run.trec:2: field 'score': expected a number, got 'high'"),
        ("q Q0 d 1 nan tag", r"run.trec:2: field 'score'"),
        ("q Q0 a 1 0.5 tag", r"run.trec:2: document 'a' occurs twice for query 'q'"),
    ],
)
def test_bad_run_line_names_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "run.trec"
    path.write_text(f"q Q0 a 1 0.9 tag\n{line}\n")
    with pytest.raises(InputError, match=message):
        read_run(path)


def test_bad_qrels_and_missing_files(tmp_path: Path) -> None:
    path = tmp_path / "qrels.trec"
    path.write_text("\nq 0 d 1.5\n")
    with pytest.raises(InputError, match=r"qrels.trec:2: field 'relevance': expected an integer, got '1.5'"):
        read_qrels(path)
    path.write_bytes(b"q 0 d\xff 1\n")
    with pytest.raises(InputError, match=r"qrels.trec:1: not valid UTF-8"):
        read_qrels(path)
    with pytest.raises(InputError, match="file not found"):
        read_run(tmp_path / "none.trec")


def test_ids_with_white_space_and_nan_are_refused_and_leave_no_file(tmp_path: Path) -> None:
    for run in ({"q 1": {"d": 1.0}}, {"q": {"d\t1": 1.0}}, {"q": {"": 1.0}}, {"q": {"d": float("nan")}}):
        with pytest.raises(InputError):
            write_run(tmp_path / "run.trec", run)
    with pytest.raises(InputError, match="white space"):
        write_qrels(tmp_path / "qrels.trec", {"q": {"d 1": 1}})
    assert list(tmp_path.iterdir()) == []
