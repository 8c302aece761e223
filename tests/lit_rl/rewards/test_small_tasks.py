"""The tasks of the built-in domains, by hand and with responses that try to cheat."""

import time
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.presets import PRESETS, preset_tokenizer
from lit_rl.rewards.chat_words import WORDS, chat_answer, chat_reward
from lit_rl.rewards.constraints import constraints_prompt
from lit_rl.rewards.sums import sums_answer, sums_reward
from lit_rl.rewards.tasks import TASKS, reward

LONG = " ".join(WORDS[:16])
RULES: dict[str, Any] = {
    "instruction_id_list": ["keywords:existence", "length_constraints:number_words", "punctuation:no_comma"],
    "kwargs": [{"keywords": ["sea"]}, {"relation": "less than", "num_words": 4}, {}],
}


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("22", 1), (" 22 ", 1), ("22\n", 1), ("-22", 0), ("+22", 0), ("022", 0), ("22.0", 0), ("22 22", 0), ("2 2", 0),
        ("12+7+3=22", 0), ("21", 0), ("", 0), ("22<|im_start|>", 0), ("\u0662\u0662", 0), ("twenty-two", 0),
        ("22" * 50_000, 0), (" " * 100_000 + "x", 0),
    ],
)  # fmt: skip
def test_a_sum_is_its_number_and_nothing_else(response: str, value: float) -> None:
    started = time.perf_counter()
    assert sums_reward(response, [12, 7, 3]) == value
    assert time.perf_counter() - started < 0.5
    assert TASKS["sums"].prompt({"numbers": [12, 7, 3]}) == "12+7+3="
    assert (sums_answer("-5"), sums_answer("x")) == ("-5", None)


@pytest.mark.parametrize(
    ("response", "value"),
    [
        ("sea.", 1 / 64 + 1 / 32 + 1 / 8),  # one word of sixteen, half of the topics
        ("sea star.", 2 / 64 + 2 / 32 + 1 / 4),
        ("sea sea sea sea.", 4 / 64 + 1 / 32 + 1 / 8),  # repeats are length alone
        ("sea nonsense words .", 1 / 64 + 1 / 32 + 1 / 8),  # what is no word of the list does not count
        (f"{LONG}.", 1.0),
        (f"{LONG} {LONG}.", 1.0),
        (LONG, 0),  # does not end
        (f"{LONG}. {LONG}.", 0),
        (f"{LONG},.", 0), ("sea, star.", 0), ("Sea.", 0), ("sea  star.", 0), (".", 0), ("", 0), ("nonsense.", 0),
        ("sea." * 1000, 0), (f"{'sea ' * 100_000}.", 0), ("a" * 100_000, 0), ("sea star.<|im_start|>", 0),
    ],
)  # fmt: skip
def test_chat_favours_long_and_varied_texts_that_end(response: str, value: float) -> None:
    started = time.perf_counter()
    assert chat_reward(response, ["sea", "star"]) == pytest.approx(value)
    assert time.perf_counter() - started < 0.5
    assert TASKS["chat_words"].prompt({"topics": ["sea", "star"]}) == "chat sea star:"
    assert (chat_answer("sea star ."), chat_answer("sea star")) == ("sea star", None)


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - {"tiny-bert", "tiny-llama"}))
def test_words_are_single_tokens(preset: str) -> None:
    tokenizer = preset_tokenizer(preset)
    assert len(set(WORDS)) == len(WORDS) == 40
    assert all(len(tokenizer(f"sea {word}")["input_ids"]) == 2 for word in WORDS)


@pytest.mark.parametrize(
    ("response", "value"),
    [("sea star", 1), ("sea, star", 2 / 3), ("star", 2 / 3), ("star, sun, man, cat", 0), ("", 0), (" \n", 0)],
)
def test_constraints_give_the_share_that_holds(response: str, value: float) -> None:
    assert reward("constraints", RULES, response) == pytest.approx(value)
    assert reward("instructions_share", {"prompt": "x", **RULES}, response) == pytest.approx(value)
    assert TASKS["constraints"].prompt(RULES) == "with sea, less than 4 words, no comma:"


@pytest.mark.parametrize(
    ("task", "row", "field"),
    [
        ("sums", {}, "numbers"),
        ("sums", {"numbers": [1, 2.5]}, "numbers"),
        ("sums", {"numbers": []}, "numbers"),
        ("chat_words", {"topics": "sea"}, "topics"),
        ("chat_words", {"topics": []}, "topics"),
        ("constraints", {"instruction_id_list": ["language:response_language"], "kwargs": [{}]}, "instruction_id_list"),
        ("constraints", {"instruction_id_list": [], "kwargs": []}, "instruction_id_list"),
        ("constraints", {"instruction_id_list": ["keywords:existence"], "kwargs": [{}]}, "kwargs[0].keywords"),
        ("instructions_share", {"prompt": "x"}, "instruction_id_list"),
    ],
)
def test_rows_without_their_fields_are_refused(task: str, row: dict[str, Any], field: str) -> None:
    with pytest.raises(InputError) as caught:
        TASKS[task].prompt(row)
    assert caught.value.field == field


def test_clauses_in_words() -> None:
    ids = ["keywords:existence", "keywords:forbidden_words", "length_constraints:number_words"]
    kwargs = [{"keywords": ["sea", "sun"]}, {"forbidden_words": ["cow"]}, {"relation": "at least", "num_words": 6}]
    assert constraints_prompt(ids, kwargs) == "with sea and sun, not cow, at least 6 words:"
