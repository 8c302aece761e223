import math
import random
from collections import Counter

import pytest

from lit_core.errors import InputError
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.ranking import rank_documents
from lit_embed.retrieval.word_ql import WordQueryLikelihood
from lit_embed.retrieval.words import WordRanker, tokenize_words

FRUIT = {
    "d1": "apple banana apple cherry",
    "d2": "banana durian",
    "d3": "apple durian durian elder fig grape",
}


def random_texts(seed: int, count: int, words: int, longest: int) -> dict[str, str]:
    draw = random.Random(seed)
    return {
        f"t{number}": " ".join(f"w{int(words * draw.random() ** 2)}" for _ in range(draw.randint(0, longest)))
        for number in range(count)
    }


def test_words_are_lower_cased_runs_of_word_characters() -> None:
    assert tokenize_words("Über-graph: x_1, l'été 42% ") == ["über", "graph", "x_1", "l", "été", "42"]
    assert tokenize_words("The runs of the runner", {"the", "of"}, lambda word: word.rstrip("s")) == ["run", "runner"]
    assert tokenize_words(" ,. ") == []


def test_bm25_worked_example() -> None:
    assert BM25(FRUIT).score("Apple durian") == pytest.approx(
        {"d1": 0.324140, "d2": 0.273258, "d3": 0.531160}, abs=1e-6
    )


def test_word_ql_worked_examples() -> None:
    dirichlet = WordQueryLikelihood(FRUIT, mu=2).score("apple durian")
    assert dirichlet == pytest.approx({"d1": -3.360375, "d2": -3.060271, "d3": -2.837127}, abs=1e-6)
    mercer = WordQueryLikelihood(FRUIT, smoothing="jelinek_mercer").score("apple durian")
    assert mercer == pytest.approx({"d1": -4.433320, "d2": -4.433320, "d3": -2.866899}, abs=1e-6)
    assert mercer["d1"] == mercer["d2"]


def test_exact_tie_goes_to_the_larger_id_at_the_cut_too() -> None:
    ranker = WordQueryLikelihood(FRUIT, smoothing="jelinek_mercer")
    assert list(ranker.search({"q": "apple durian"}, top_k=3)["q"]) == ["d3", "d2", "d1"]
    assert list(ranker.search({"q": "apple durian"}, top_k=2)["q"]) == ["d3", "d2"]
    copies = BM25(dict.fromkeys("bdace", "same words") | {"z": "other"})
    assert list(copies.search({"q": "words"}, top_k=2)["q"]) == ["e", "d"]


def naive_bm25(corpus: dict[str, str], query: str, k1: float, b: float) -> dict[str, float]:
    documents = {name: Counter(text.split()) for name, text in corpus.items()}
    mean = sum(sum(counts.values()) for counts in documents.values()) / len(documents)
    scores = dict.fromkeys(corpus, 0.0)
    for word in query.split():
        df = sum(word in counts for counts in documents.values())
        idf = math.log(1 + (len(corpus) - df + 0.5) / (df + 0.5))
        for name, counts in documents.items():
            norm = k1 * (1 - b + b * sum(counts.values()) / mean)
            scores[name] += idf * counts[word] / (counts[word] + norm) if counts[word] else 0.0
    return scores


def naive_ql(corpus: dict[str, str], query: str, smoothing: str, mu: float, lam: float) -> dict[str, float]:
    documents = {name: Counter(text.split()) for name, text in corpus.items()}
    collection = sum(documents.values(), Counter())
    scores = dict.fromkeys(corpus, 0.0)
    for word in query.split():
        share = collection[word] / collection.total()
        for name, counts in documents.items():
            if share and smoothing == "dirichlet":
                scores[name] += math.log((counts[word] + mu * share) / (counts.total() + mu))
            elif share:
                within = counts[word] / counts.total() if counts else 0.0
                scores[name] += math.log((1 - lam) * within + lam * share)
    return scores


@pytest.mark.parametrize("seed", range(3))
def test_scores_equal_a_literal_loop_on_random_texts(seed: int) -> None:
    corpus, queries = random_texts(seed, 40, 60, 25), random_texts(seed + 100, 15, 75, 6)
    bm25 = BM25(corpus, k1=1.2, b=0.75)
    dirichlet = WordQueryLikelihood(corpus, mu=7)
    mercer = WordQueryLikelihood(corpus, "jelinek_mercer", lam=0.3)
    for query in queries.values():
        assert bm25.score(query) == pytest.approx(naive_bm25(corpus, query, 1.2, 0.75), rel=1e-5, abs=1e-6)
        assert dirichlet.score(query) == pytest.approx(naive_ql(corpus, query, "dirichlet", 7, 0), abs=1e-10)
        assert mercer.score(query) == pytest.approx(naive_ql(corpus, query, "jelinek_mercer", 0, 0.3), abs=1e-10)


@pytest.mark.parametrize("kind", [BM25, WordQueryLikelihood])
def test_search_is_the_top_of_score(kind: type[WordRanker], monkeypatch: pytest.MonkeyPatch) -> None:
    corpus, queries = random_texts(5, 50, 30, 12), random_texts(6, 20, 40, 4)
    ranker = kind(corpus)
    whole = ranker.search(queries, top_k=8)
    assert list(whole) == list(queries)
    for query_id, text in queries.items():
        scores = ranker.score(text)
        ranked = [doc_id for doc_id in rank_documents(scores) if kind is WordQueryLikelihood or scores[doc_id] > 0]
        known = any(word in ranker.vocabulary for word in text.split())
        assert list(whole[query_id]) == (ranked[:8] if known else [])
    monkeypatch.setattr("lit_embed.retrieval.words.CELLS", 120)  # two queries at a time
    assert ranker.search(queries, top_k=8) == whole


def test_query_without_known_words_keeps_an_empty_place() -> None:
    for ranker in (BM25(FRUIT), WordQueryLikelihood(FRUIT)):
        assert ranker.search({"known": "fig", "unknown": "quince", "empty": ""}, 1) == {
            "known": {"d3": pytest.approx(ranker.score("fig")["d3"])},
            "unknown": {},
            "empty": {},
        }


def test_repeated_query_words_count_each_time() -> None:
    for ranker in (BM25(FRUIT), WordQueryLikelihood(FRUIT)):
        once, twice = ranker.score("durian"), ranker.score("durian durian")
        assert twice == pytest.approx({doc_id: 2 * score for doc_id, score in once.items()})


def test_stop_words_and_stems_reach_documents_and_queries() -> None:
    corpus = {"a": "the cats", "b": "the dog", "c": "the bird"}
    ranker = BM25(corpus, stopwords={"the"}, stemmer=lambda word: word.rstrip("s"))
    assert ranker.search({"q": "the cat", "r": "the", "s": "dogs"}) == {
        "q": {"a": pytest.approx(ranker.score("cats")["a"])},
        "r": {},
        "s": {"b": pytest.approx(ranker.score("dog")["b"])},
    }


def test_bad_input_is_told_in_one_line() -> None:
    with pytest.raises(InputError, match="corpus is empty"):
        BM25({})
    with pytest.raises(InputError, match="no document of the corpus has a word"):
        WordQueryLikelihood({"a": "", "b": "--"})
    with pytest.raises(InputError, match="field 'lam'"):
        WordQueryLikelihood(FRUIT, lam=0.0)
    with pytest.raises(InputError, match="field 'mu'"):
        WordQueryLikelihood(FRUIT, mu=-1.0)
    with pytest.raises(InputError, match="field 'b'"):
        BM25(FRUIT, b=1.5)
    with pytest.raises(InputError, match="field 'top_k'"):
        BM25(FRUIT).search({"q": "fig"}, 0)
