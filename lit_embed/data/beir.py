"""Reading folders in the BEIR layout: ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/<split>.tsv``."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track
from lit_embed.data.records import Collection, Example, Passage, merge_examples

logger = logging.getLogger(__name__)

QRELS_HEADER = ("query-id", "corpus-id", "score")


class Document(NamedTuple):
    """A document as the file has it."""

    title: str
    text: str

    @property
    def full_text(self) -> str:
        """Title and text, as a retriever sees them."""
        return f"{self.title} {self.text}".strip()


def available_splits(folder: Path | str) -> list[str]:
    """Return the names of the splits that have judgements, sorted.

    Raises:
        InputError: The folder is missing.
    """
    return sorted(path.stem for path in (_existing(folder) / "qrels").glob("*.tsv"))


def read_documents(folder: Path | str) -> dict[str, Document]:
    """Read ``corpus.jsonl`` as ``{doc_id: Document}``; an empty text is allowed, a missing title counts as empty.

    Raises:
        InputError: The folder or file is missing, a line is broken, a field is missing or no string, an id occurs
            twice, or there is no document at all. The error names the file, the line and the field.
    """
    path = _existing(folder) / "corpus.jsonl"
    if not path.is_file():
        raise InputError("no corpus.jsonl in this folder; a BEIR folder needs one, a document per line", folder)
    documents: dict[str, Document] = {}
    for line, doc_id, row in _rows_with_id(path):
        title = row.get("title")
        if title is None:
            title = ""
        documents[doc_id] = Document(
            string_field({"title": title}, "title", path, line), string_field(row, "text", path, line)
        )
    if not documents:
        raise InputError("the corpus is empty; it needs at least one document", path)
    empty = sum(not document.full_text for document in documents.values())
    if empty:
        logger.info("%s: %d of %d documents have neither title nor text", path, empty, len(documents))
    return documents


def read_queries(folder: Path | str) -> dict[str, str]:
    """Read ``queries.jsonl`` as ``{query_id: text}``.

    Raises:
        InputError: As ``read_documents``, and where the text of a query is empty.
    """
    path = _existing(folder) / "queries.jsonl"
    queries: dict[str, str] = {}
    for line, query_id, row in _rows_with_id(path):
        queries[query_id] = string_field(row, "text", path, line).strip()
        if not queries[query_id]:
            raise InputError(f"query '{query_id}' is empty; give it a text or remove it", path, line, "text")
    return queries


def read_qrels(
    folder: Path | str, split: str, queries: dict[str, str], documents: dict[str, Document]
) -> dict[str, dict[str, int]]:
    """Read the judgements of one split as ``{query_id: {doc_id: grade}}``.

    Raises:
        InputError: The split is missing or empty, the header or a row is malformed, a grade is no integer, or an id
            is unknown. The error names the file and the line.
    """
    path = _existing(folder) / "qrels" / f"{split}.tsv"
    if not path.is_file():
        splits = ", ".join(available_splits(folder)) or "none"
        raise InputError(f"no judgements for split '{split}'; this folder has: {splits}", path)
    qrels: dict[str, dict[str, int]] = {}
    for line, (query_id, doc_id, text) in _qrels_rows(path):
        try:
            grade = int(text)
        except ValueError:
            raise InputError(f"the grade must be an integer, got '{text}'", path, line, "score") from None
        if query_id not in queries:
            raise InputError(f"query '{query_id}' is not in queries.jsonl", path, line, "query-id")
        if doc_id not in documents:
            raise InputError(f"document '{doc_id}' is not in corpus.jsonl", path, line, "corpus-id")
        judged = qrels.setdefault(query_id, {})
        if judged.get(doc_id, grade) != grade:
            raise InputError(f"document '{doc_id}' has two different grades for query '{query_id}'", path, line)
        judged[doc_id] = grade
    if not qrels:
        raise InputError(f"split '{split}' has no judgements below the header", path)
    return qrels


def read_beir(folder: Path | str, split: str) -> Collection:
    """Read a BEIR folder; the queries are those that the split judges.

    Args:
        folder: Folder with ``corpus.jsonl``, ``queries.jsonl`` and ``qrels/``.
        split: Name of a file in ``qrels/`` without its ending.

    Raises:
        InputError: Anything is missing, broken or inconsistent; one line naming file, line and field.
    """
    documents, queries = read_documents(folder), read_queries(folder)
    qrels = read_qrels(folder, split, queries, documents)
    corpus = {doc_id: document.full_text for doc_id, document in documents.items()}
    return Collection(Path(folder).resolve().name, corpus, {query_id: queries[query_id] for query_id in qrels}, qrels)


def read_beir_pairs(folder: Path | str, split: str = "train") -> list[Example]:
    """Read a split's judgements as training examples; see ``pairs_from_qrels``."""
    return pairs_from_qrels(read_beir(folder, split))


def pairs_from_qrels(collection: Collection) -> list[Example]:
    """Turn judgements into examples: grades above 0 are positives, grades of 0 or below are hard negatives.

    Queries without a positive, and positives without text, are left out. Queries with the same text are merged.
    """
    examples = []
    for query_id, judged in collection.qrels.items():
        passages = [(Passage(doc_id, collection.corpus[doc_id]), grade) for doc_id, grade in judged.items()]
        positives = tuple(passage for passage, grade in passages if grade > 0 and passage.text)
        negatives = tuple(passage for passage, grade in passages if grade <= 0 and passage.text)
        if positives:
            examples.append(Example(query_id, collection.queries[query_id], positives, negatives))
    return merge_examples(examples)


def string_field(row: dict[str, Any], field: str, path: Path | str, line: int | None) -> str:
    """Return a field that must be a string.

    Raises:
        InputError: The field is missing, of another type, or half of a surrogate pair, which is no text.
    """
    if field not in row:
        raise InputError(f"the field is missing; the row has: {', '.join(row) or 'nothing'}", path, line, field)
    value = row[field]
    if not isinstance(value, str):
        raise InputError(f"must be a string, got {type(value).__name__}", path, line, field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError("holds half of a surrogate pair, a broken \\u escape", path, line, field) from None
    return value


def _existing(folder: Path | str) -> Path:
    if not Path(folder).is_dir():
        raise InputError("no such folder", folder)
    return Path(folder)


def _rows_with_id(path: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    first_line: dict[str, int] = {}
    for line, row in track(read_jsonl(path), f"reading {path.name}", unit="row"):
        row_id = string_field(row, "_id", path, line)
        if not row_id or row_id.split() != [row_id]:
            raise InputError(f"an id must be non-empty and without spaces, got '{row_id}'", path, line, "_id")
        if row_id in first_line:
            raise InputError(f"id '{row_id}' was already used in line {first_line[row_id]}", path, line, "_id")
        first_line[row_id] = line
        yield line, row_id, row


def _qrels_rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    with path.open("rb") as stream:
        for line, row in enumerate(stream, start=1):
            try:
                text = row.decode("utf-8")
            except UnicodeDecodeError as error:
                raise InputError(f"not valid UTF-8 ({error})", path, line) from None
            columns = text.rstrip("\r\n").split("\t")
            if line == 1 and tuple(columns) != QRELS_HEADER:
                raise InputError(f"the first line must be '{' '.join(QRELS_HEADER)}' separated by tabs", path, 1)
            if line == 1 or not text.strip():
                continue
            if len(columns) != 3:
                raise InputError(f"expected 3 columns separated by tabs, got {len(columns)}", path, line)
            yield line, columns
