"""Hard negatives for training examples that have none."""

import random
from collections.abc import Mapping

from lit_core.errors import InputError
from lit_core.samplers import mix_seed
from lit_embed.data.records import Example, Passage

MINED_PER_QUERY = 16  # a pool to draw from anew each epoch
SEARCH_DEPTH = 100


def add_bm25_negatives(
    examples: list[Example], corpus: Mapping[str, str], negatives: int, seed: int = 0
) -> list[Example]:
    """Give each example without negatives the passages that BM25 ranks highest and that are no known positives.

    A query that shares no word with any other passage gets random passages.

    Args:
        examples: Examples; those with negatives stay as they are.
        corpus: Passages to choose from, by id; those without text are left out.
        negatives: Negatives drawn per query in training; the pool holds at least ``MINED_PER_QUERY``.
        seed: Seed of the random passages.

    Raises:
        InputError: A query has every passage of the corpus as a positive.
    """
    from lit_embed.retrieval.bm25 import BM25
    from lit_embed.retrieval.mining import mine_hard_negatives

    wanting = {str(row): example for row, example in enumerate(examples) if not example.negatives}
    texts = {doc_id: text for doc_id, text in corpus.items() if text}
    if not wanting:
        return examples
    count = max(negatives, MINED_PER_QUERY)
    positives = {row: {passage.doc_id for passage in example.positives} for row, example in wanting.items()}
    depth = SEARCH_DEPTH + max(map(len, positives.values()))
    run = BM25(texts).search({row: example.query for row, example in wanting.items()}, top_k=depth)
    mined = mine_hard_negatives(run, positives, count, rank_range=(0, SEARCH_DEPTH))
    ids, result = list(texts), list(examples)
    for row, example in wanting.items():
        chosen = mined.get(row) or _random_ids(ids, positives[row], count, mix_seed(seed, int(row)))
        if not chosen:
            raise InputError(f"query '{example.query_id}' has every passage as a positive: no negative can be mined")
        result[int(row)] = example._replace(negatives=tuple(Passage(i, texts[i]) for i in chosen), negative_scores=None)
    return result


def _random_ids(ids: list[str], excluded: set[str], count: int, seed: int) -> list[str]:
    drawn = random.Random(seed).sample(ids, min(len(ids), count + len(excluded)))
    return [doc_id for doc_id in drawn if doc_id not in excluded][:count]
