"""Reading training pairs and triples, one JSON object a row, in the layouts the field uses.

The layout is recognised row by row from the fields (those in brackets are optional):

- ours: ``query, positives, [negatives, scores, query_id]``; ``scores`` are the positives' first, then the negatives'
- FlagEmbedding: ``query, pos, [neg, pos_scores, neg_scores, prompt]``; the prompt is put before the query
- Tevatron, older: ``query, positive_passages, [negative_passages, query_id]``
- Tevatron, newer: ``query_text, positive_document_ids, [negative_document_ids, query_id]``, and a corpus
- Sentence Transformers: ``anchor`` or ``query``, ``positive, [negative, negative_1, negative_2, ...]``

A passage is a string or an object with ``text`` and optionally ``title`` and an id (``doc_id``, ``docid`` or ``_id``).
A passage without an id gets one from its content, a query without an id likewise, so that equal texts share it.
"""

import math
import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track
from lit_embed.data.beir import string_field
from lit_embed.data.records import Example, Passage, content_id, merge_examples

_LAYOUTS = "positives | pos | positive_passages | positive_document_ids | positive"


def read_pairs(
    path: Path | str, corpus: Mapping[str, str] | Path | str | None = None, limit: int | None = None
) -> list[Example]:
    """Read a JSONL file of pairs or triples; rows with the same query text become one example.

    Args:
        path: The file.
        corpus: Texts by document id, or a JSONL file of them, for rows that name documents by id. If ``None``,
            ``corpus.jsonl`` beside the file is used where it exists.
        limit: Read this many rows at most.

    Raises:
        InputError: The file is missing or empty, or a row is broken; the error names the line and the field.
    """
    path = Path(path)
    reader = PairReader(path, corpus_beside(path) if corpus is None else corpus)
    rows = track(islice(read_jsonl(path), limit), f"reading {path.name}", unit="row")
    examples = merge_examples(reader.parse(row, line) for line, row in rows)
    if not examples:
        raise InputError("the file has no rows", path)
    return examples


def corpus_beside(path: Path) -> Path | None:
    """Return ``corpus.jsonl`` beside a file, where it exists."""
    beside = path.with_name("corpus.jsonl")
    return beside if beside.is_file() and path != beside else None


def read_id_corpus(path: Path | str) -> dict[str, str]:
    """Read a JSONL corpus as ``{id: text}``: ``docid``, ``doc_id`` or ``_id``; ``text`` or ``document_text``.

    Raises:
        InputError: A row lacks an id or a text, or an id occurs twice.
    """
    corpus: dict[str, str] = {}
    for line, row in track(read_jsonl(path), f"reading {Path(path).name}", unit="row"):
        passage = _passage(row, path, line, "text", needs_id=True)
        if passage.doc_id in corpus:
            raise InputError(f"id '{passage.doc_id}' occurs twice", path, line)
        corpus[passage.doc_id] = passage.text
    return corpus


class PairReader:
    """Turns rows of any of the layouts into examples.

    Args:
        source: Name of the file or data set, for error messages.
        corpus: Texts by document id, or a file of them, read when a row first needs it.
    """

    def __init__(self, source: Path | str, corpus: Mapping[str, str] | Path | str | None = None) -> None:
        self.source, self._corpus = source, corpus

    def parse(self, row: Mapping[str, Any], line: int | None = None) -> Example:
        """Turn one row into an example.

        Raises:
            InputError: The query is empty, there is no positive, or a field is missing or of the wrong type.
        """
        row = {field: value for field, value in row.items() if value is not None}
        if "positives" in row:
            return self._example(row, line, "query", "positives", "negatives", *self._own_scores(row, line))
        if "pos" in row:
            scores = tuple(self._scores(row, line, side, f"{side}_scores") for side in ("pos", "neg"))
            return self._example(row, line, "query", "pos", "neg", *scores)
        if "positive_passages" in row:
            return self._example(row, line, "query", "positive_passages", "negative_passages")
        if "positive_document_ids" in row:
            return self._example(self._with_texts(row, line), line, "query_text", "positive", "negative")
        if "positive" in row:
            return self._example(self._with_columns(row), line, "anchor" if "anchor" in row else "query",
                                 "positive", "negative")  # fmt: skip
        raise InputError(f"no positive: need one of {_LAYOUTS}; the row has: {', '.join(row)}", self.source, line)

    def _example(
        self, row: dict[str, Any], line: int | None, query_field: str, positive_field: str, negative_field: str,
        positive_scores: tuple[float, ...] | None = None, negative_scores: tuple[float, ...] | None = None,
    ) -> Example:  # fmt: skip
        query = string_field(row, query_field, self.source, line).strip()
        if not query:
            raise InputError("the query is empty", self.source, line, query_field)
        prompt = row.get("prompt", "") if positive_field == "pos" else ""
        if prompt:
            query = string_field(row, "prompt", self.source, line) + query
        positives = self._passages(row, line, positive_field)
        if not positives:
            raise InputError("needs at least one positive", self.source, line, positive_field)
        negatives = self._passages(row, line, negative_field)
        query_id = str(row["query_id"]) if "query_id" in row else content_id(query)
        example = Example(query_id, query, positives, negatives, positive_scores, negative_scores)
        return merge_examples([example])[0]

    def _passages(self, row: dict[str, Any], line: int | None, field: str) -> tuple[Passage, ...]:
        values = row.get(field, [])
        if isinstance(values, str | dict):
            values = [values]
        if not isinstance(values, list | tuple):
            raise InputError(f"must be a list of passages, got {type(values).__name__}", self.source, line, field)
        return tuple(_passage(value, self.source, line, field) for value in values)

    def _own_scores(
        self, row: dict[str, Any], line: int | None
    ) -> tuple[tuple[float, ...] | None, tuple[float, ...] | None]:
        if "scores" not in row:
            return None, None
        split = len(self._passages(row, line, "positives"))
        scores = self._numbers(row, line, "scores", split + len(self._passages(row, line, "negatives")))
        return scores[:split], scores[split:]

    def _scores(self, row: dict[str, Any], line: int | None, passages: str, field: str) -> tuple[float, ...] | None:
        return self._numbers(row, line, field, len(self._passages(row, line, passages))) if row.get(field) else None

    def _numbers(self, row: dict[str, Any], line: int | None, field: str, count: int) -> tuple[float, ...]:
        values = row[field]
        numeric = isinstance(values, list) and all(
            isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
        )
        if not numeric or len(values) != count:
            raise InputError(f"must be a list of {count} finite numbers, one a passage", self.source, line, field)
        return tuple(float(value) for value in values)

    def _with_texts(self, row: dict[str, Any], line: int | None) -> dict[str, Any]:
        """Look up the documents that a row names by id."""
        row = dict(row)
        for side in ("positive", "negative"):
            field = f"{side}_document_ids"
            ids = row.pop(field, [])
            if not isinstance(ids, list):
                raise InputError(f"must be a list of ids, got {type(ids).__name__}", self.source, line, field)
            row[side] = [{"doc_id": str(i), "text": self._text(str(i), line, field)} for i in ids]
        if not row["positive"]:
            raise InputError("needs at least one positive", self.source, line, "positive_document_ids")
        return row

    def _text(self, doc_id: str, line: int | None, field: str) -> str:
        if self._corpus is None:
            raise InputError("rows that name documents by id need corpus.jsonl beside them", self.source, line, field)
        if isinstance(self._corpus, str | Path):
            self._corpus = read_id_corpus(self._corpus)
        if doc_id not in self._corpus:
            raise InputError(f"document '{doc_id}' is not in the corpus", self.source, line, field)
        return self._corpus[doc_id]

    @staticmethod
    def _with_columns(row: dict[str, Any]) -> dict[str, Any]:
        """Gather the columns ``negative``, ``negative_1``, ... into one list."""
        numbered = sorted((int(name[9:]), name) for name in row if re.fullmatch(r"negative_\d+", name))
        columns = [name for name in ("negative",) if name in row] + [name for _, name in numbered]
        values = [row[name] if isinstance(row[name], list) else [row[name]] for name in columns]
        return {**row, "negative": [value for group in values for value in group]}


def _passage(value: Any, source: Path | str, line: int | None, field: str, needs_id: bool = False) -> Passage:
    """Read a passage given as a string, or as an object with ``text`` and optionally ``title`` and an id."""
    doc_id = None
    if isinstance(value, dict):
        doc_id = next((value[name] for name in ("doc_id", "docid", "_id") if value.get(name) is not None), None)
        text_field = "document_text" if "document_text" in value else "text"
        title = value["title"] if value.get("title") is not None else ""
        text = (
            string_field({"title": title}, "title", source, line) + " " + string_field(value, text_field, source, line)
        )
    elif isinstance(value, str):
        text = value
    else:
        raise InputError(f"a passage is a string or an object, got {type(value).__name__}", source, line, field)
    text = text.strip()
    if needs_id and doc_id is None:
        raise InputError("the row has no id (docid, doc_id or _id)", source, line)
    if not text and not needs_id:
        raise InputError("a passage is empty", source, line, field)
    return Passage(content_id(text) if doc_id is None else str(doc_id), text)
