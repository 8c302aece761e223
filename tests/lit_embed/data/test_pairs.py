import json
from pathlib import Path
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_embed.data.pairs import read_pairs
from lit_embed.data.records import Example, content_id


def write(path: Path, *rows: Any) -> Path:
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return path


def texts(example: Example) -> tuple[list[str], list[str]]:
    return [p.text for p in example.positives], [n.text for n in example.negatives]


OURS = {"query": "q", "positives": ["p1", {"doc_id": "7", "title": "T", "text": "p2"}], "negatives": ["n1", "n2"]}
LAYOUTS: list[dict[str, Any]] = [
    OURS,
    {"query": "q", "pos": ["p1", "T p2"], "neg": ["n1", "n2"], "pos_scores": [], "type": "normal"},
    {
        "query_id": 3,
        "query": "q",
        "positive_passages": [{"docid": "1", "title": "", "text": "p1"}, {"docid": "7", "title": "T", "text": "p2"}],
        "negative_passages": [{"docid": "8", "text": "n1"}, {"docid": "9", "text": "n2"}],
    },
    {"query_text": "q", "positive_document_ids": ["1", "7"], "negative_document_ids": ["8", "9"]},
    {"anchor": "q", "positive": ["p1", "T p2"], "negative": "n1", "negative_1": "n2"},
]


@pytest.mark.parametrize("row", LAYOUTS, ids=["ours", "flagembedding", "tevatron_old", "tevatron_new", "columns"])
def test_every_layout_gives_the_same_example(tmp_path: Path, row: dict[str, Any]) -> None:
    corpus = [("1", "p1"), ("7", "T p2"), ("8", "n1"), ("9", "n2")]
    write(tmp_path / "corpus.jsonl", *({"docid": i, "document_text": text} for i, text in corpus))
    (example,) = read_pairs(write(tmp_path / "pairs.jsonl", row))
    assert example.query == "q"
    assert texts(example) == (["p1", "T p2"], ["n1", "n2"])
    assert example.positive_scores is None


def test_layouts_may_be_mixed_and_equal_queries_are_merged(tmp_path: Path) -> None:
    rows = [
        {"query": "q", "positive": "p1"},
        {"query": "q", "pos": ["p2"], "neg": ["p1"]},
        {"query": "r", "pos": ["s"]},
    ]
    first, second = read_pairs(write(tmp_path / "a.jsonl", *rows))
    assert texts(first) == (["p1", "p2"], [])
    assert first.positives[0].doc_id == content_id("p1")
    assert second.query == "r"


def test_scores_and_prompt(tmp_path: Path) -> None:
    rows = [{**OURS, "scores": [3, 2, 1, 0.5]}, {"query": "x", "prompt": "ask: ", "pos": ["y"], "pos_scores": [4]}]
    ours, flag = read_pairs(write(tmp_path / "a.jsonl", *rows))
    assert (ours.positive_scores, ours.negative_scores) == ((3.0, 2.0), (1.0, 0.5))
    assert (flag.query, flag.positive_scores, flag.negative_scores) == ("ask: x", (4.0,), None)


@pytest.mark.parametrize(
    ("row", "place", "words"),
    [
        ({"query": " ", "pos": ["p"]}, "field 'query'", "empty"),
        ({"query": "q", "pos": []}, "field 'pos'", "at least one positive"),
        ({"query": "q", "positives": None}, ":2", "need one of positives"),
        ({"query": 3, "pos": ["p"]}, "field 'query'", "must be a string"),
        ({"pos": ["p"]}, "field 'query'", "missing"),
        ({"query": "q", "pos": [3]}, "field 'pos'", "got int"),
        ({"query": "q", "pos": 3}, "field 'pos'", "list of passages"),
        ({"query": "q", "pos": ["p"], "neg": [""]}, "field 'neg'", "empty"),
        ({**OURS, "scores": [1, 2]}, "field 'scores'", "4 finite numbers"),
        ({"query": "q", "pos": ["p"], "pos_scores": [float("nan")]}, "field 'pos_scores'", "1 finite numbers"),
        ({"query_text": "q", "positive_document_ids": ["1"]}, "field 'positive_document_ids'", "corpus.jsonl beside"),
    ],
)
def test_mistakes_name_line_and_field(tmp_path: Path, row: dict[str, Any], place: str, words: str) -> None:
    with pytest.raises(InputError) as error:
        read_pairs(write(tmp_path / "pairs.jsonl", OURS, row))
    assert "pairs.jsonl:2" in str(error.value)
    assert place in str(error.value)
    assert words in str(error.value)


def test_unknown_document_and_empty_file(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", {"query_text": "q", "positive_document_ids": ["5"]})
    with pytest.raises(InputError, match="document '5' is not in the corpus"):
        read_pairs(path, {"1": "text"})
    with pytest.raises(InputError, match="no rows"):
        read_pairs(write(tmp_path / "b.jsonl"))
