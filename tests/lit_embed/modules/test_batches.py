import hashlib
import pickle
from typing import Any

import pytest
import torch

from lit_core.presets import preset_tokenizer
from lit_core.tokens import Tokens
from lit_embed.modules.batches import LikelihoodCollator, PairCollator, TextCollator, document_key
from lit_embed.modules.tokenization import EncoderConfig, TextTokenizer

CONFIG = EncoderConfig("eos", query_prompt="find: ", passage_prompt="read this: ", suffix=" so:")
PLAIN = preset_tokenizer("tiny-qwen3")
EOS = PLAIN.eos_token_id


def _item(query: str, ids: str, positive_ids: str = "", seed: int = 0, own: bool = False) -> dict[str, Any]:
    """Passages are named by letters and say so; the first is the positive."""
    passages = [f"the passage {letter} of the river" for letter in ids]
    known = list(positive_ids or ids[0])
    return {"query": query, "query_id": query, "passages": passages, "passage_ids": list(ids), "positive_ids": known,
            "own_group_only": own, "dataset": "set", "seed": seed}  # fmt: skip


@pytest.fixture(params=["tiny-qwen3", "tiny-llama", "tiny-bert"])
def texts(request: pytest.FixtureRequest) -> TextTokenizer:
    return TextTokenizer(preset_tokenizer(request.param), CONFIG)


def _row(tokens: Tokens, row: int) -> list[int]:
    return tokens.ids.split(tokens.lengths)[row].tolist()


def test_document_keys_are_equal_everywhere_and_fit_a_long() -> None:
    digest = hashlib.blake2b(b"d1", digest_size=8).digest()
    assert document_key("d1") == int.from_bytes(digest, "big") >> 1
    assert all(0 <= document_key(str(number)) < 2**63 for number in range(1000))
    assert len({document_key(str(number)) for number in range(1000)}) == 1000


def test_a_document_that_two_queries_drew_is_one_column(texts: TextTokenizer) -> None:
    rows = [_item("one", "ab", "ac"), _item("two", "cb", own=True), _item("three", "a")]
    batch = PairCollator(texts)(rows)
    assert (batch.queries, len(batch.tokens)) == (3, 3 + 3)  # a, b, c
    assert batch.targets.tolist() == [0, 2, 0]
    assert batch.passage_keys.tolist() == [document_key(letter) for letter in "abc"]
    assert batch.positive_keys.tolist() == [
        [document_key("a"), document_key("c")], [document_key("c"), -1], [document_key("a"), -1],
    ]  # fmt: skip
    assert batch.own.tolist() == [[True, True, False], [False, True, True], [True, False, False]]
    assert batch.own_only.tolist() == [False, True, False]
    assert _row(batch.tokens, 1) == texts(["two"], "query").ids.tolist()
    assert _row(batch.tokens, 5) == texts(["the passage c of the river"], "passage").ids.tolist()


def test_texts_keep_their_ids(texts: TextTokenizer) -> None:
    batch = TextCollator(texts, "passage")([{"id": "x", "text": "one"}, {"id": "y", "text": "two"}])
    assert batch.ids == ["x", "y"]
    assert _row(batch.tokens, 1) == texts(["two"], "passage").ids.tolist()


def test_documents_are_sources_and_queries_targets(texts: TextTokenizer) -> None:
    batch = LikelihoodCollator(texts, 0.0, shuffled=True)([_item("one", "ab"), _item("two", "b")])
    assert _row(batch.documents, 0) == texts(["the passage a of the river"], "passage").ids.tolist()
    assert _row(batch.queries, 0) == [*PLAIN("one", add_special_tokens=False)["input_ids"], texts.eos_id]  # no prompt
    assert batch.shuffled is not None
    assert _row(batch.shuffled, 0) == _row(batch.documents, 1)
    assert _row(batch.shuffled, 1) == _row(batch.documents, 0)
    assert all(_row(batch.documents, row)[-1] == texts.eos_id for row in (0, 1))


def test_the_shuffled_document_is_another_one(texts: TextTokenizer) -> None:
    collator = LikelihoodCollator(texts, 0.0, shuffled=True)
    batch = collator([_item("one", "a"), _item("two", "a"), _item("three", "b")])
    assert batch.shuffled is not None
    assert [_row(batch.shuffled, row) == _row(batch.documents, row) for row in range(3)] == [False] * 3
    assert collator([_item("one", "a"), _item("two", "a")]).shuffled is None
    assert collator([_item("one", "a")]).shuffled is None


def test_the_other_direction_swaps_the_sides(texts: TextTokenizer) -> None:
    batch = LikelihoodCollator(texts, 0.0, direction="query_to_document")([_item("one", "ab")])
    assert _row(batch.documents, 0) == texts(["one"], "query").ids.tolist()
    passage = PLAIN("the passage a of the river", add_special_tokens=False)["input_ids"]
    assert _row(batch.queries, 0) == [*passage, texts.eos_id]


def test_both_directions_are_drawn_row_by_row_from_the_seed(texts: TextTokenizer) -> None:
    rows = [_item("one", "a", seed=seed) for seed in range(40)]
    batch = LikelihoodCollator(texts, 0.0, direction="both")(rows)
    reverse = [length == len(texts(["one"], "query").ids) for length in batch.documents.lengths]
    assert 8 < sum(reverse) < 32
    alone = [LikelihoodCollator(texts, 0.0, direction="both")([row]).documents.lengths[0] for row in rows]
    assert alone == batch.documents.lengths


def test_draws_depend_on_the_row_alone(texts: TextTokenizer) -> None:
    collate = LikelihoodCollator(texts, 0.6)
    rows = [_item("one", "a", seed=seed) for seed in range(4)]
    torch.manual_seed(1)
    first = collate(rows)
    torch.manual_seed(2)
    again = pickle.loads(pickle.dumps(collate))(rows[::-1])
    assert [_row(first.documents, row) for row in range(4)] == [_row(again.documents, 3 - row) for row in range(4)]
    assert len({tuple(_row(first.documents, row)) for row in range(4)}) > 1
    assert torch.equal(first.queries.ids, again.queries.ids)  # targets are never corrupted


def test_hidden_words_leave_the_frame_alone(texts: TextTokenizer) -> None:
    row = LikelihoodCollator(texts, 1.0)([_item("one", "a")]).documents.ids.tolist()
    assert row == texts(["_ _ _ _ _ _"], "passage").ids.tolist()


def test_hidden_tokens_are_all_of_the_text_and_nothing_else(texts: TextTokenizer) -> None:
    collate = LikelihoodCollator(texts, 1.0, unit="token")
    whole = texts(["the passage a of the river"], "passage").ids.tolist()
    row = collate([_item("one", "a")]).documents.ids.tolist()
    body = len(PLAIN("the passage a of the river", add_special_tokens=False)["input_ids"])
    assert len(row) == len(whole)
    hidden = [at for at, token in enumerate(row) if token != whole[at]]
    assert hidden == list(range(hidden[0], hidden[0] + body))
    assert all(row[at] == collate.mask_id for at in hidden)
    assert LikelihoodCollator(texts, 0.0, unit="token")([_item("one", "a")]).documents.ids.tolist() == whole


def test_corruption_comes_before_truncation_and_spares_the_end() -> None:
    texts = TextTokenizer(PLAIN, EncoderConfig("eos", suffix=" so:", query_length=5, passage_length=9))
    item = _item("one two three four five six", "a")
    batch = LikelihoodCollator(texts, 1.0)([item])
    tail = [*PLAIN(" so:", add_special_tokens=False)["input_ids"], EOS]
    assert batch.documents.lengths == [9]
    assert _row(batch.documents, 0)[-len(tail) :] == tail
    assert batch.queries.lengths == [5]
    assert _row(batch.queries, 0)[-1] == EOS


def test_a_mask_without_tokens_needs_a_mask_token() -> None:
    with pytest.raises(ValueError, match="the mask string '' has no token in this tokenizer"):
        LikelihoodCollator(TextTokenizer(PLAIN, CONFIG), 0.5, mask="")
    bert = LikelihoodCollator(TextTokenizer(preset_tokenizer("tiny-bert"), CONFIG), 0.5, mask="")
    assert bert.mask == "[MASK]"
