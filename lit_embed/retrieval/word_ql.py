"""Word-based query likelihood with Dirichlet or Jelinek-Mercer smoothing."""

from collections.abc import Callable, Collection, Mapping
from typing import Any, Literal

import numpy as np
import scipy.sparse

from lit_core.errors import InputError
from lit_embed.retrieval.words import WordRanker


class WordQueryLikelihood(WordRanker):
    """Log-probability of the query under each document's smoothed unigram model, in nats.

    With ``c`` the count of a word in the document, ``p`` its share of the collection's words and ``|d|`` the document's
    length, a query word adds ``log((c + mu p) / (|d| + mu))`` (Dirichlet) or ``log((1 - lam) c / |d| + lam p)``
    (Jelinek-Mercer). Repeated query words count each time; words that the collection does not have are skipped.
    An empty document is scored by the collection alone. Every document has a score, so ``search`` also returns ones
    that share no word with the query. (Lucene's variants drop those and floor Dirichlet at 0.)

    Only words that a document has are stored: each formula is split into ``log(1 + ...)`` over those, and a part
    that depends on the word or the length alone.

    Args:
        corpus: Text of each document id.
        smoothing: ``dirichlet`` or ``jelinek_mercer``.
        mu: Dirichlet prior in words, above 0.
        lam: Weight of the collection in Jelinek-Mercer smoothing, above 0, at most 1.
        stemmer: Called once on each distinct word; none by default.
        stopwords: Lower-case words to ignore; none by default.

    Raises:
        InputError: The corpus is empty or has no word, or a parameter is out of range.
    """

    matched_only = False

    def __init__(
        self,
        corpus: Mapping[str, str],
        smoothing: Literal["dirichlet", "jelinek_mercer"] = "dirichlet",
        mu: float = 1000.0,
        lam: float = 0.1,
        stemmer: Callable[[str], str] | None = None,
        stopwords: Collection[str] = frozenset(),
    ) -> None:
        if smoothing not in ("dirichlet", "jelinek_mercer"):
            raise InputError(f"must be 'dirichlet' or 'jelinek_mercer', got {smoothing!r}", field="smoothing")
        if not mu > 0:
            raise InputError(f"must be above 0, got {mu}", field="mu")
        if not 0 < lam <= 1:
            raise InputError(f"must be above 0 and at most 1, got {lam}", field="lam")
        super().__init__(corpus, stopwords, stemmer)
        self.smoothing = smoothing
        lengths = np.array([len(ids) for ids in self.token_ids], dtype=np.float64)
        words = np.concatenate([np.asarray(ids, dtype=np.int64) for ids in self.token_ids])
        documents = np.repeat(np.arange(len(corpus)), lengths.astype(np.int64))
        self.token_ids = []
        shape = (len(self.vocabulary), len(corpus))
        counts = scipy.sparse.coo_matrix((np.ones(len(words)), (words, documents)), shape=shape).tocsr().tocoo()
        share = np.bincount(words, minlength=shape[0]) / len(words)  # p
        if smoothing == "dirichlet":
            self.word_part, self.length_part = np.log(mu * share), np.log(lengths + mu)
            ratio = counts.data / (mu * share[counts.row])
        else:
            self.word_part, self.length_part = np.log(lam * share), np.zeros_like(lengths)
            ratio = (1.0 - lam) * counts.data / lengths[counts.col] / (lam * share[counts.row])
        self.weights = scipy.sparse.coo_matrix((np.log1p(ratio), (counts.row, counts.col)), shape=shape).tocsr()

    def _dense_scores(self, counts: Any) -> np.ndarray[Any, np.dtype[Any]]:
        """Return log-probabilities ``(Q, N)``, float64; 0 for a query without a known word."""
        query_lengths = np.asarray(counts.sum(axis=1))  # (Q, 1), known words only
        shared = (counts @ self.word_part)[:, None] - query_lengths * self.length_part
        return super()._dense_scores(counts) + shared
