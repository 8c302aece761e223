"""Runs and qrels in TREC format."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from lit_core.errors import InputError
from lit_core.files import atomic_path
from lit_embed.retrieval.ranking import Qrels, Run, rank_documents


def _check_id(value: str, kind: str) -> str:
    if not value or value.split() != [value]:
        raise InputError(f"{kind} id {value!r} is empty or has white space, which a TREC file cannot hold; rename it")
    return value


def _rows(path: Path | str, columns: str) -> Iterator[tuple[int, list[str]]]:
    """Yield line number and fields of each non-blank line, checked for the number of fields."""
    path, count = Path(path), len(columns.split())
    if not path.is_file():
        raise InputError("file not found", path)
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            try:
                fields = line.decode().split()
            except UnicodeDecodeError:
                raise InputError("not valid UTF-8", path, number) from None
            if fields and len(fields) != count:
                raise InputError(f"expected {count} fields ({columns}), got {len(fields)}", path, number)
            if fields:
                yield number, fields


def write_run(path: Path | str, run: Mapping[str, Mapping[str, float]], tag: str = "lit_embed") -> None:
    """Write a run as ``query Q0 document rank score tag``, best first, ranks from 1.

    Scores are written in full, so that reading gives the same numbers. Queries without documents leave no line.

    Raises:
        InputError: An id or the tag has white space or is empty, or a score is NaN.
    """
    _check_id(tag, "tag as an")
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for query_id, scores in run.items():
            _check_id(query_id, "query")
            for doc_id, score in scores.items():
                if math.isnan(score):
                    raise InputError(f"the score of document {doc_id!r} for query {query_id!r} is NaN")
            for rank, doc_id in enumerate(rank_documents(scores), start=1):
                _check_id(doc_id, "document")
                stream.write(f"{query_id} Q0 {doc_id} {rank} {float(scores[doc_id])!r} {tag}\n")


def read_run(path: Path | str) -> Run:
    """Read a TREC run; the rank column is ignored, as trec_eval does.

    Raises:
        InputError: The file is missing, or a line is malformed, repeats a document or has no number as score.
    """
    run: Run = {}
    for number, (query_id, _, doc_id, _, score, _) in _rows(path, "query Q0 document rank score tag"):
        scores = run.setdefault(query_id, {})
        if doc_id in scores:
            raise InputError(f"document {doc_id!r} occurs twice for query {query_id!r}", path, number)
        try:
            value = float(score)
        except ValueError:
            value = math.nan
        if math.isnan(value):
            raise InputError(f"expected a number, got {score!r}", path, number, "score")
        scores[doc_id] = value
    return run


def write_qrels(path: Path | str, qrels: Mapping[str, Mapping[str, int]]) -> None:
    """Write qrels as ``query 0 document relevance``; queries without judgements leave no line.

    Raises:
        InputError: An id has white space or is empty.
    """
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as stream:
        for query_id, relevance in qrels.items():
            _check_id(query_id, "query")
            for doc_id, grade in relevance.items():
                stream.write(f"{query_id} 0 {_check_id(doc_id, 'document')} {int(grade)}\n")


def read_qrels(path: Path | str) -> Qrels:
    """Read TREC qrels (BEIR's tab-separated files with a header are read by ``lit_embed.data``).

    Raises:
        InputError: The file is missing, or a line is malformed, repeats a document or has no integer as relevance.
    """
    qrels: Qrels = {}
    for number, (query_id, _, doc_id, grade) in _rows(path, "query 0 document relevance"):
        relevance = qrels.setdefault(query_id, {})
        if doc_id in relevance:
            raise InputError(f"document {doc_id!r} occurs twice for query {query_id!r}", path, number)
        try:
            relevance[doc_id] = int(grade)
        except ValueError:
            raise InputError(f"expected an integer, got {grade!r}", path, number, "relevance") from None
    return qrels
