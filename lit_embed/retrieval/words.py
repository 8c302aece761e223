"""What the word-based rankers share: words, a vocabulary, and search over a sparse word-document matrix."""

import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
import scipy.sparse
import torch

from lit_core.errors import InputError
from lit_core.progress import track
from lit_embed.retrieval.ranking import Run, tie_ranks, top_k_columns

WORD = re.compile(r"\w+")
CELLS = 2**24  # scores held at once, 64 MiB in float32


def tokenize_words(
    text: str, stopwords: Collection[str] = frozenset(), stemmer: Callable[[str], str] | None = None
) -> list[str]:
    """Split a text into words: lower-cased runs of Unicode letters, digits and underscores.

    Args:
        text: Any text; an empty one has no words.
        stopwords: Lower-case words to leave out, before stemming.
        stemmer: Called on each remaining word.
    """
    words = [word for word in WORD.findall(text.lower()) if word not in stopwords]
    return words if stemmer is None else [stemmer(word) for word in words]


class WordRanker:
    """Base of rankers whose score is a sum over query words of a weight looked up in a sparse matrix.

    A subclass sets ``weights`` (words x documents, CSR) from ``token_ids`` and may add a part that every document has.

    Args:
        corpus: Text of each document id; at least one with a word.
        stopwords: Words ignored in documents and queries.
        stemmer: Called once on each distinct word.

    Raises:
        InputError: The corpus is empty or has no word.
    """

    weights: Any  # scipy.sparse.csr_matrix (V, N)
    matched_only: bool = True  # leave documents without a query word out of the results

    def __init__(
        self,
        corpus: Mapping[str, str],
        stopwords: Collection[str] = frozenset(),
        stemmer: Callable[[str], str] | None = None,
    ) -> None:
        if not corpus:
            raise InputError("the corpus is empty; give at least one document")
        self.doc_ids = list(corpus)
        self.stopwords = frozenset(stopwords)
        self.stemmer = stemmer
        self.vocabulary: dict[str, int] = {}
        self._word_ids: dict[str, int] = {}  # raw word -> id of its stem
        self.token_ids = [
            self._encode(text, grow=True) for text in track(corpus.values(), "words of the corpus", unit="doc")
        ]
        if not self.vocabulary:
            raise InputError("no document of the corpus has a word; look at the texts, the stop words and the stemmer")
        self.ties = tie_ranks(self.doc_ids)

    def _encode(self, text: str, grow: bool = False) -> list[int]:
        """Return the ids of a text's words with repetition; unknown words are added or left out."""
        ids = []
        for word in tokenize_words(text, self.stopwords):
            number = self._word_ids.get(word)
            if number is None:
                stem = word if self.stemmer is None else self.stemmer(word)
                if grow:
                    number = self._word_ids[word] = self.vocabulary.setdefault(stem, len(self.vocabulary))
                else:
                    number = self.vocabulary.get(stem)
            if number is not None:
                ids.append(number)
        return ids

    def _query_counts(self, texts: list[str]) -> Any:
        """Return how often each known word occurs in each query, CSR float64 ``(Q, V)``."""
        counts = [Counter(self._encode(text)) for text in texts]
        indptr = np.cumsum([0, *map(len, counts)])
        columns = np.fromiter((word for row in counts for word in sorted(row)), np.int64, indptr[-1])
        values = np.fromiter((row[word] for row in counts for word in sorted(row)), np.float64, indptr[-1])
        return scipy.sparse.csr_matrix((values, columns, indptr), shape=(len(texts), len(self.vocabulary)))

    def _dense_scores(self, counts: Any) -> np.ndarray[Any, np.dtype[Any]]:
        """Return the scores ``(Q, N)`` of queries given as counts ``(Q, V)``."""
        return (counts @ self.weights).toarray()

    def score(self, query: str) -> dict[str, float]:
        """Return the score of every document of the corpus for one query."""
        return dict(zip(self.doc_ids, self._dense_scores(self._query_counts([query]))[0].tolist(), strict=True))

    def search(self, queries: Mapping[str, str], top_k: int = 100) -> Run:
        """Rank the corpus for each query.

        Args:
            queries: Text of each query id.
            top_k: Documents to keep per query.

        Returns:
            A run with float32 scores, best first; equal scores are ordered by document id, descending, also where
            the list is cut. A query without a known word has an empty ranking.

        Raises:
            InputError: ``top_k`` is below 1.
        """
        if top_k < 1:
            raise InputError(f"must be at least 1, got {top_k}", field="top_k")
        query_ids, texts = list(queries), list(queries.values())
        rows = max(1, CELLS // len(self.doc_ids))
        run: Run = {}
        for start in track(range(0, len(texts), rows), f"{type(self).__name__} search", unit="chunk"):
            counts = self._query_counts(texts[start : start + rows])
            dense = torch.from_numpy(self._dense_scores(counts).astype(np.float32))
            scores, columns = top_k_columns(dense, self.ties, top_k)
            known = np.diff(counts.indptr) > 0
            for row, query_id in enumerate(query_ids[start : start + rows]):
                pairs = zip(columns[row].tolist(), scores[row].tolist(), strict=True)
                run[query_id] = {
                    self.doc_ids[column]: score
                    for column, score in pairs
                    if known[row] and (score > 0 or not self.matched_only)
                }
        return run
