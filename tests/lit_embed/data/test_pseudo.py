from pathlib import Path

import pytest

from lit_embed.data.beir import Document, read_documents
from lit_embed.data.pseudo import pseudo_collection, sentence_pairs, title_pairs
from lit_embed.data.records import Passage

CRANFIELD = Path(__file__).parents[4] / "shared" / "data" / "cranfield"

BODY = "one two three four five six seven eight nine ten"


def test_titles_ask_for_the_text_without_a_copy_of_them() -> None:
    documents = {
        "1": Document("Flow past a wing .", f"flow  past a WING.   {BODY}"),
        "2": Document("Flow past a", f"flow past a {BODY}"),
        "3": Document("flow past", f"flow past {BODY}"),  # two words ask for too little
        "4": Document("flow past a wing", "flow past a wing alone"),  # nothing left to ask for
        "5": Document("", BODY),
        "6": Document("Flow past a wing .", f"{BODY} eleven"),
    }
    first, second = title_pairs(documents)
    assert first.query == "Flow past a wing ."
    assert first.positives == (Passage("1", BODY), Passage("6", f"{BODY} eleven"))  # one title, two documents
    assert second.positives == (Passage("2", BODY),)


def test_a_title_that_begins_a_longer_word_is_not_cut() -> None:
    (example,) = title_pairs({"1": Document("on the wing", f"on the wingspan {BODY}")})
    assert example.positives[0].text.startswith("on the wingspan")


@pytest.mark.parametrize(
    ("text", "query"),
    [
        (f"the first sentence. {BODY}.", "the first sentence."),
        (f"the first one . {BODY} .", "the first one"),
        (f"a ratio of 3. 5 and more . {BODY}", "a ratio of 3. 5 and more"),
        (f"4181. fluid in man . {BODY}", "4181. fluid in man"),
        (f"asks it who? {BODY}", "asks it who?"),
    ],
)
def test_first_sentences_ask_for_the_rest(text: str, query: str) -> None:
    (example,) = sentence_pairs({"1": Document("", text)})
    assert example.query == query
    assert example.positives[0].text.startswith(BODY)


def test_a_text_of_one_sentence_gives_no_pair() -> None:
    assert sentence_pairs({"1": Document("", BODY)}) == []


def test_the_collection_hides_the_titles_it_asks_with() -> None:
    documents = {
        "1": Document("flow past a wing", BODY),
        "2": Document("heat in a slab", BODY),
        "3": Document("x", "y"),
    }
    examples = title_pairs(documents)
    collection = pseudo_collection("c", documents, examples[:1], examples)
    assert collection.corpus == {"1": BODY, "2": BODY, "3": "x y"}
    assert collection.queries == {"title:1": "flow past a wing"}
    assert collection.qrels == {"title:1": {"1": 1}}


@pytest.mark.skipif(not CRANFIELD.is_dir(), reason="needs the real collection in ../shared/data/cranfield")
def test_cranfield_texts_lose_their_titles() -> None:
    examples = title_pairs(read_documents(CRANFIELD))
    assert len(examples) > 1300
    copies = [e for e in examples if e.positives[0].text.lower().startswith(e.query.rstrip(" .").lower())]
    assert not copies
