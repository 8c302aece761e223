import json
import time
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_rl.rewards.instructions import (
    INSTRUCTIONS,
    all_instructions_reward,
    check_instructions,
    count_sentences,
    instruction_reward,
)

ENGLISH = "We have to go to the market today because there are no vegetables left at home."
LEAST, LESS = "at least", "less than"
EXAMPLES: list[tuple[str, dict[str, Any], str, str]] = [  # arguments, a response that follows, one that does not
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LEAST},
        "A WELL-KNOWN man",
        "A man",
    ),
    (
        "change_case:capital_word_frequency",
        {"capital_frequency": 2, "capital_relation": LESS},
        "USA and we",
        "USA and I",
    ),
    ("change_case:english_capital", {}, ENGLISH.upper(), ENGLISH),
    ("change_case:english_capital", {}, ENGLISH.upper(), "WIR MÜSSEN HEUTE AUF DEN MARKT GEHEN, WEIL NICHTS DA IST."),
    ("change_case:english_lowercase", {}, ENGLISH.lower(), ENGLISH),
    (
        "combination:repeat_prompt",
        {"prompt_to_repeat": "Write a poem."},
        " write a poem.\nRoses",
        "Sure! Write a poem.",
    ),
    ("combination:two_responses", {}, "one\n******\ntwo", "one\n******\none"),
    ("combination:two_responses", {}, "******\none ****** two******", "one ****** ****** two"),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "[name], [street]", "[name], (street)"),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Yes.\np. s. No.", "Yes. PS no."),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "Yes.\nP.P.S no", "Yes.\nP.S. no"),
    ("detectable_format:constrained_response", {}, "My answer is maybe. So.", "My answer is perhaps."),
    ("detectable_format:json_format", {}, '```json\n{"a": [1]}\n```', '{"a": [1}'),
    ("detectable_format:json_format", {}, '{"a": 1}', 'Here it is: {"a": 1}'),
    (
        "detectable_format:multiple_sections",
        {"section_spliter": "Day", "num_sections": 2},
        "Day 1\na\nDay 2\nb",
        "Day 1\na\nday 2",
    ),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "So:\n* a\n- b", "* a\n* b\n* c"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold**\n---\n * *a*", "**bold**\n1. a"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*a* and **b**", "*a* and ** **"),
    ("detectable_format:title", {}, "<<A day>>\nIt rained.", "<A day>\nIt << >> rained."),
    ("keywords:existence", {"keywords": ["mom", "mother"]}, "Moms, or mothers", "Moms"),
    ("keywords:forbidden_words", {"forbidden_words": ["rock", "c++"]}, "Rocky roads", "We will ROCK you"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LEAST}, "War and warmth", "War"),
    ("keywords:frequency", {"keyword": "war", "frequency": 2, "relation": LESS}, "War", "War and warmth"),
    ("keywords:letter_frequency", {"letter": "q", "let_frequency": 2, "let_relation": LEAST}, "Quite quick", "Quite"),
    ("keywords:letter_frequency", {"letter": "#", "let_frequency": 1, "let_relation": LESS}, "Quite", "# Quite"),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "elm", "num_paragraphs": 2, "nth_paragraph": 2},
        'a b\n\n"Elm, c',
        "Elm b\n\nc",
    ),
    (
        "length_constraints:nth_paragraph_first_word",
        {"first_word": "elm", "num_paragraphs": 1, "nth_paragraph": 1},
        "Elm",
        "Elm\n\nb",
    ),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "***\na\n***\nb\n***", "a\n\nb"),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "a *** b", "a *** *** b"),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": LESS},
        "Dr. J. Who ate 3.5 pies, e.g. two.",
        "So. So",
    ),
    (
        "length_constraints:number_sentences",
        {"num_sentences": 2, "relation": LEAST},
        'he said "no!" then he left.',
        "1. Eggs\n2. Ham",
    ),
    ("length_constraints:number_words", {"num_words": 3, "relation": LEAST}, "one, two-three", "one, two"),
    ("punctuation:no_comma", {}, "One and two", "One, two"),
    ("startend:end_checker", {"end_phrase": "Peace!"}, 'So long. "Peace!"\n', "Peace! So long."),
    ("startend:quotation", {}, ' "So it is."\n', '"So" it is.'),
]
LANGUAGES = {
    "ar": "يجب أن أذهب إلى السوق اليوم لأن الخضروات نفدت من المنزل.",
    "bg": "Днес трябва да отида на пазара, защото вкъщи няма зеленчуци.",
    "bn": "আমাকে আজ বাজারে যেতে হবে কারণ বাড়িতে সবজি শেষ হয়ে গেছে।",
    "de": "Ich muss heute auf den Markt gehen, weil zu Hause kein Gemüse mehr da ist.",
    "fa": "امروز باید به بازار بروم چون سبزیجات در خانه تمام شده است.",
    "fi": "Minun täytyy mennä tänään torille, koska kotona ei ole enää vihanneksia.",
    "gu": "મારે આજે બજારમાં જવું છે કારણ કે ઘરમાં શાકભાજી ખતમ થઈ ગયા છે.",
    "hi": "मुझे आज बाजार जाना है क्योंकि घर में सब्जियाँ खत्म हो गई हैं।",
    "it": "Oggi devo andare al mercato perché a casa sono finite le verdure.",
    "kn": "ನಾನು ಇಂದು ಮಾರುಕಟ್ಟೆಗೆ ಹೋಗಬೇಕು ಏಕೆಂದರೆ ಮನೆಯಲ್ಲಿ ತರಕಾರಿಗಳು ಇಲ್ಲ.",
    "ko": "집에 채소가 다 떨어져서 오늘 시장에 가야 합니다.",
    "mr": "मला आज बाजारात जायचे आहे कारण घरात भाज्या संपल्या आहेत.",
    "ne": "मलाई आज बजार जानु छ किनभने घरमा तरकारी सकिएको छ।",
    "pa": "ਮੈਨੂੰ ਅੱਜ ਬਾਜ਼ਾਰ ਜਾਣਾ ਹੈ ਕਿਉਂਕਿ ਘਰ ਵਿੱਚ ਸਬਜ਼ੀਆਂ ਖਤਮ ਹੋ ਗਈਆਂ ਹਨ।",
    "pt": "Hoje preciso ir ao mercado porque os legumes acabaram em casa.",
    "ru": "Сегодня мне нужно пойти на рынок, потому что дома закончились овощи.",
    "sw": "Leo ninahitaji kwenda sokoni kwa sababu mboga zimeisha nyumbani.",
    "ta": "வீட்டில் காய்கறிகள் தீர்ந்துவிட்டதால் நான் இன்று சந்தைக்குச் செல்ல வேண்டும்.",
    "te": "ఇంట్లో కూరగాయలు అయిపోయాయి కాబట్టి నేను ఈరోజు మార్కెట్‌కు వెళ్లాలి.",
    "th": "วันนี้ฉันต้องไปตลาดเพราะที่บ้านไม่มีผักเหลือแล้ว",
    "ur": "مجھے آج بازار جانا ہے کیونکہ گھر میں سبزیاں ختم ہو گئی ہیں",
    "vi": "Hôm nay tôi phải đi chợ vì ở nhà đã hết rau.",
    "zh-cn": "因为家里没有蔬菜了所以我今天得去市场。",
}


@pytest.mark.parametrize(("instruction", "kwargs", "follows", "violates"), EXAMPLES)
def test_each_kind(instruction: str, kwargs: dict[str, Any], follows: str, violates: str) -> None:
    assert check_instructions(follows, [instruction], [kwargs]) == [True]
    assert check_instructions(violates, [instruction], [kwargs]) == [False]
    assert check_instructions(" \n", [instruction], [kwargs]) == [False]


def test_languages() -> None:
    for language, text in LANGUAGES.items():
        ids, kwargs = ["language:response_language"] * 2, [{"language": language}, {"language": "en"}]
        assert check_instructions(text, ids, kwargs) == [True, False], language
        assert check_instructions(ENGLISH, ids, kwargs) == [False, True]


def test_every_kind_has_an_example() -> None:
    assert {instruction for instruction, *_ in EXAMPLES} | {"language:response_language"} == set(INSTRUCTIONS)


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("", 0),
        ("...", 0),
        ("One. Two! Three? Four", 4),
        ("One (so he said.) Two... Three.", 3),
        ("one is this. two is that.", 2),
        ("It was I. Mr. A. B. Smith left at 5 p.m. on 3.5.", 2),
        ("One line\nand the same sentence.\nAnother.", 2),
        ("今天去市场。家里没有菜\uff01", 2),
        ("घर जाओ। अब सो जाओ।", 2),
    ],
)
def test_count_sentences(text: str, sentences: int) -> None:
    assert count_sentences(text) == sentences


def test_rewards_of_three_instructions() -> None:
    ids = ["punctuation:no_comma", "length_constraints:number_words", "startend:quotation"]
    kwargs: list[dict[str, Any]] = [{}, {"num_words": 2, "relation": LEAST, "language": None}, {}]
    assert instruction_reward("two words", ids, kwargs) == pytest.approx(2 / 3)
    assert all_instructions_reward("two words", ids, kwargs) == 0
    assert all_instructions_reward('"two words"', ids, kwargs) == instruction_reward('"two words"', ids, kwargs) == 1
    assert all_instructions_reward("", ids, kwargs) == instruction_reward("", ids, kwargs) == 0
    assert instruction_reward("anything", [], []) == all_instructions_reward("anything", [], []) == 1


@pytest.mark.parametrize(
    ("instruction", "response"),
    [
        ("detectable_format:json_format", "Here you are:\n{}"),
        ("detectable_format:json_format", "{}\nAnything else?"),
        ("detectable_format:json_format", "Here you are:\n{}\nAnything else?"),
        ("startend:quotation", '**"So it is."**'),
        ("startend:quotation", 'Sure:\n*"So it is."*'),
    ],
)
def test_the_loose_form_forgives_first_and_last_lines_and_asterisks(instruction: str, response: str) -> None:
    assert instruction_reward(response, [instruction], [{}]) == 0
    assert instruction_reward(response, [instruction], [{}], loose=True) == 1
    assert all_instructions_reward(response, [instruction], [{}], loose=True) == 1


def test_the_loose_form_is_not_met_by_nothing() -> None:
    assert instruction_reward("a, b", ["punctuation:no_comma"], [{}], loose=True) == 0  # nor by a line taken away


@pytest.mark.parametrize(
    ("instruction", "kwargs", "message"),
    [
        ("length_constraints:letters", {}, r"field 'instruction_ids\[0\]': .*'length_constraints:letters'"),
        (
            "length_constraints:number_words",
            {"relation": LESS},
            r"field 'kwargs\[0\]\.num_words': .*a whole number, got None",
        ),
        (
            "length_constraints:number_words",
            {"num_words": "3", "relation": LESS},
            r"'kwargs\[0\]\.num_words': .*got '3'",
        ),
        (
            "length_constraints:number_words",
            {"num_words": 3, "relation": "most"},
            r"'kwargs\[0\]\.relation': .*got 'most'",
        ),
        ("keywords:existence", {"keywords": "mom"}, r"'kwargs\[0\]\.keywords': .*a list of words, got 'mom'"),
        ("startend:end_checker", {"end_phrase": ""}, r"'kwargs\[0\]\.end_phrase': .*text, got ''"),
        ("language:response_language", {"language": "xx"}, r"'kwargs\[0\]\.language': .*got 'xx'"),
    ],
)
def test_refused(instruction: str, kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_instructions("a", [instruction], [kwargs])
    with pytest.raises(InputError, match="field 'kwargs': need one mapping for each of 1 ids, got 0"):
        check_instructions("a", [instruction], [])


def test_long_responses_without_sense_cost_little() -> None:
    ids, kwargs = [e[0] for e in EXAMPLES], [e[1] for e in EXAMPLES]
    started = time.perf_counter()
    for text in ("<<", "[", "*", "**", "-", ". ", ".", "\n", "```", "***", "P.", "a-", '"', "{", "Day "):
        check_instructions("x" + text * 20_000 + "x", ids, kwargs)
    assert time.perf_counter() - started < 2


def test_all_prompts_of_ifeval_are_understood(shared_data: Any) -> None:
    path = shared_data / "ifeval" / "prompts.jsonl"
    if not path.is_file():
        pytest.skip(f"the prompts of IFEval are not here: {path} is missing")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {instruction for row in rows for instruction in row["instruction_id_list"]} == set(INSTRUCTIONS)
    results = [check_instructions(ENGLISH, row["instruction_id_list"], row["kwargs"]) for row in rows]
    assert sum(map(len, results)) == 834
    for row, followed in zip(rows, results, strict=True):
        for instruction, value in zip(row["instruction_id_list"], followed, strict=True):
            if instruction == "punctuation:no_comma":
                assert value
            if instruction in ("language:response_language", "combination:two_responses"):
                assert not value
