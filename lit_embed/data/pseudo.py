"""Training pairs without judgements: a document's own title or first sentence asks for the rest of it."""

import re
from collections.abc import Callable, Mapping
from typing import Literal

from lit_core.progress import track
from lit_embed.data.beir import Document
from lit_embed.data.records import Collection, Example, Passage, merge_examples

MIN_QUERY_WORDS = 3
MIN_PASSAGE_WORDS = 10

_SENTENCE_END = re.compile(r"(?<=[^\W\d_][.!?])\s+|(?<=[.!?])\s+(?=[^\W\d_])|\s+[.!?]\s+")  # not within "3. 5"


def title_pairs(documents: Mapping[str, Document]) -> list[Example]:
    """Pair each title with the text below it, from which a leading copy of the title is removed.

    Titles of fewer than ``MIN_QUERY_WORDS`` words and texts of fewer than ``MIN_PASSAGE_WORDS`` are left out. The
    positive keeps the document's id, so that false negatives can be masked; documents that share a title are positives
    of one query.
    """
    return _pairs("title", documents, lambda document: (document.title, _without_title(document.title, document.text)))


def sentence_pairs(documents: Mapping[str, Document]) -> list[Example]:
    """Pair the first sentence of each text with the rest, for documents without titles; limits as ``title_pairs``."""
    return _pairs("sentence", documents, lambda document: _split_first_sentence(document.text))


def pseudo_pairs(documents: Mapping[str, Document], kind: Literal["title", "sentence"]) -> list[Example]:
    """Build the pairs of one kind."""
    return title_pairs(documents) if kind == "title" else sentence_pairs(documents)


def pseudo_collection(name: str, documents: Mapping[str, Document], held_out: list[Example],
                      examples: list[Example]) -> Collection:  # fmt: skip
    """Build a collection in which the held-out queries ask for their documents.

    Args:
        name: Name of the collection.
        documents: The whole corpus; every document can be retrieved.
        held_out: The pairs that become queries.
        examples: All pairs, held out or not. Their documents are shown as in training, without the part that asks for
            them: with it the task would be solved by matching strings.
    """
    corpus = {doc_id: document.full_text for doc_id, document in documents.items()}
    corpus.update({passage.doc_id: passage.text for example in examples for passage in example.positives})
    queries = {example.query_id: example.query for example in held_out}
    qrels = {example.query_id: {passage.doc_id: 1 for passage in example.positives} for example in held_out}
    return Collection(name, corpus, queries, qrels)


def _pairs(kind: str, documents: Mapping[str, Document], split: Callable[[Document], tuple[str, str]]) -> list[Example]:
    examples = []
    for doc_id, document in track(documents.items(), f"making {kind} pairs", len(documents), "document"):
        query, passage = split(document)
        query, passage = " ".join(query.split()), passage.strip()
        if len(_words(query)) >= MIN_QUERY_WORDS and len(_words(passage)) >= MIN_PASSAGE_WORDS:
            examples.append(Example(f"{kind}:{doc_id}", query, (Passage(doc_id, passage),)))
    return merge_examples(examples)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _without_title(title: str, text: str) -> str:
    """Remove leading copies of the title, whatever their case, spacing and punctuation."""
    words = _words(title)
    if not words:
        return text
    title = r"\W*" + r"\W+".join(map(re.escape, words)) + r"(?!\w)"
    copy = re.match(rf"(?:{title})+[\s.:;,!?)\]-]*", text, re.IGNORECASE)
    return text[copy.end() :] if copy else text


def _split_first_sentence(text: str) -> tuple[str, str]:
    """Split after the first sentence end that leaves enough words before it (a leading "12." is no sentence)."""
    text = text.strip()
    for end in _SENTENCE_END.finditer(text):
        if len(_words(text[: end.start()])) >= MIN_QUERY_WORDS:
            return text[: end.start()], text[end.end() :]
    return text, ""
