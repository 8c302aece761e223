import json
from pathlib import Path
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_embed.data.beir import available_splits, read_beir, read_beir_pairs, read_documents
from lit_embed.data.records import Passage

CRANFIELD = Path(__file__).parents[4] / "shared" / "data" / "cranfield"

DOCUMENTS: list[Any] = [
    {"_id": "d1", "title": "Apples", "text": "grow on trees"},
    {"_id": "d2", "title": "", "text": "pears too"},
    {"_id": "d3", "text": ""},
]
QUERIES: list[Any] = [{"_id": "q1", "text": "where do apples grow"}, {"_id": "q2", "text": "pears"}]
QRELS = "query-id\tcorpus-id\tscore\nq1\td1\t2\nq1\td2\t0\n"


def write(folder: Path, documents: Any = DOCUMENTS, queries: Any = QUERIES, qrels: str = QRELS) -> Path:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    for name, rows in (("corpus", documents), ("queries", queries)):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    (folder / "qrels" / "test.tsv").write_text(qrels)
    return folder


def test_a_folder_is_read(tmp_path: Path) -> None:
    collection = read_beir(write(tmp_path / "fruit"), "test")
    assert collection.name == "fruit"
    assert collection.corpus == {"d1": "Apples grow on trees", "d2": "pears too", "d3": ""}
    assert collection.queries == {"q1": "where do apples grow"}  # q2 is not judged in this split
    assert collection.qrels == {"q1": {"d1": 2, "d2": 0}}
    assert available_splits(tmp_path / "fruit") == ["test"]


def test_judgements_become_pairs(tmp_path: Path) -> None:
    (example,) = read_beir_pairs(write(tmp_path), "test")
    assert example.positives == (Passage("d1", "Apples grow on trees"),)
    assert example.negatives == (Passage("d2", "pears too"),)  # judged and not relevant


@pytest.mark.parametrize(
    ("change", "place", "words"),
    [
        ({"documents": ["{"]}, "corpus.jsonl:1", "not valid JSON"),
        ({"documents": []}, "corpus.jsonl", "empty"),
        ({"documents": [{"_id": "d", "text": "\ud83d"}]}, "corpus.jsonl:1: field 'text'", "surrogate"),
        ({"documents": [{"_id": 1, "text": "a"}]}, "corpus.jsonl:1: field '_id'", "must be a string, got int"),
        ({"documents": [{"_id": "a b", "text": "a"}]}, "corpus.jsonl:1: field '_id'", "without spaces"),
        ({"documents": [{"_id": "d", "title": "t"}]}, "corpus.jsonl:1: field 'text'", "missing"),
        ({"documents": [*DOCUMENTS, DOCUMENTS[0]]}, "corpus.jsonl:4: field '_id'", "already used in line 1"),
        ({"queries": [*QUERIES, {"_id": "q3", "text": " "}]}, "queries.jsonl:3: field 'text'", "empty"),
        ({"qrels": "q1\td1\t1\n"}, "test.tsv:1", "first line"),
        ({"qrels": QRELS + "q1 d1 1\n"}, "test.tsv:4", "3 columns"),
        ({"qrels": QRELS + "q1\td1\t1.5\n"}, "test.tsv:4: field 'score'", "integer"),
        ({"qrels": QRELS + "q9\td1\t1\n"}, "test.tsv:4: field 'query-id'", "'q9' is not in queries.jsonl"),
        ({"qrels": QRELS + "q1\td9\t1\n"}, "test.tsv:4: field 'corpus-id'", "'d9' is not in corpus.jsonl"),
        ({"qrels": QRELS + "q1\td1\t1\n"}, "test.tsv:4", "two different grades"),
        ({"qrels": "query-id\tcorpus-id\tscore\n"}, "test.tsv", "no judgements"),
    ],
)
def test_mistakes_are_told_in_one_line(tmp_path: Path, change: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_beir(write(tmp_path, **change), "test")
    assert place in str(error.value)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_judgements_that_are_no_text(tmp_path: Path) -> None:
    folder = write(tmp_path)
    (folder / "qrels" / "test.tsv").write_bytes(QRELS.encode() + b"q1\t\xff\t1\n")
    with pytest.raises(InputError, match=r"test\.tsv:4: not valid UTF-8"):
        read_beir(folder, "test")


def test_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such folder"):
        read_documents(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no corpus\.jsonl"):
        read_documents(tmp_path)
    with pytest.raises(InputError, match="no judgements for split 'dev'; this folder has: test"):
        read_beir(write(tmp_path), "dev")


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="needs the real collection in ../shared/data/cranfield")
def test_cranfield() -> None:
    collection = read_beir(CRANFIELD, "test")
    assert (len(collection.corpus), len(collection.queries)) == (1400, 75)
    assert sum(not text for text in collection.corpus.values()) == 2
    assert not set(collection.queries) & set(read_beir(CRANFIELD, "train").queries)
