"""BM25, through bm25s."""

from collections.abc import Callable, Collection, Mapping

import scipy.sparse

from lit_core.errors import InputError
from lit_embed.retrieval.words import WordRanker


class BM25(WordRanker):
    """BM25 as Lucene scores it: ``idf * tf / (tf + k1 * (1 - b + b * length / mean length))``, without ``k1 + 1``.

    ``idf = ln(1 + (N - df + 0.5) / (df + 0.5))``; a word that the query repeats counts each time. Document lengths are
    exact (Lucene rounds them to a byte). Documents that share no word with the query are not returned by ``search``.

    Args:
        corpus: Text of each document id.
        k1: Term-frequency saturation, at least 0.
        b: Length normalisation, from 0 (none) to 1.
        stemmer: Called once on each distinct word; none by default.
        stopwords: Lower-case words to ignore; none by default.

    Raises:
        InputError: The corpus is empty or has no word, or a parameter is out of range.
    """

    def __init__(
        self,
        corpus: Mapping[str, str],
        k1: float = 0.9,
        b: float = 0.4,
        stemmer: Callable[[str], str] | None = None,
        stopwords: Collection[str] = frozenset(),
    ) -> None:
        import bm25s

        if not k1 >= 0:
            raise InputError(f"must be at least 0, got {k1}", field="k1")
        if not 0 <= b <= 1:
            raise InputError(f"must lie between 0 and 1, got {b}", field="b")
        super().__init__(corpus, stopwords, stemmer)
        index = bm25s.BM25(k1=k1, b=b, method="lucene", backend="numpy")
        large = len(corpus) > 50_000  # below that it takes a second or two and a bar would only flash by
        index.index((self.token_ids, self.vocabulary), create_empty_token=False, show_progress=large)
        self.token_ids = []  # only the index is needed from here on
        parts = (index.scores["data"], index.scores["indices"], index.scores["indptr"])
        self.weights = scipy.sparse.csr_matrix(parts, shape=(len(self.vocabulary), len(corpus)))
