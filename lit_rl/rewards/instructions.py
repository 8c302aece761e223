"""Instructions whose observance can be checked by reading, of the kinds that IFEval has (arXiv 2311.07911).

Two checks read text by a rule of our own, so that nothing is downloaded: ``count_sentences``, and the detection of
languages by ``py3langid``, which always gives the same text the same language.
"""

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from inspect import signature
from types import ModuleType
from typing import Any

from lit_core.errors import InputError

RELATIONS = ("less than", "at least")
CONSTRAINED_RESPONSES = ("My answer is yes.", "My answer is no.", "My answer is maybe.")
SENTENCE_ENDS = (".", "!", "?", "\u2026", "\u3002", "\uff01", "\uff1f", "\u0964", "\u061f", "\u06d4")
CLOSING = "\"'\u201d\u2019)]}*_`\u00bb\u300d"
ABBREVIATION = re.compile(  # or an initial, but for I
    r"(?i:mr|mrs|ms|dr|prof|st|jr|sr|vs|e\.g|i\.e|cf|inc|ltd|fig|approx|u\.s|a\.m|p\.m|(?:p\.)+s)\.|[A-HJ-Z]\."
)


def check_instructions(
    response: str, instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], loose: bool = False
) -> list[bool]:
    """Whether a response follows each of its instructions; a blank response follows none.

    Args:
        response: Without the model's thoughts.
        instruction_ids: Keys of ``INSTRUCTIONS``.
        kwargs: For each instruction the arguments of its check; others are ignored, and None is as good as missing.
        loose: Also count an instruction as followed when the response would follow it without its first line, its last
            line or both, or without asterisks, or with any of these together (IFEval's loose accuracy).

    Raises:
        InputError: An id is not known, or an argument is missing or of another type.
    """
    if len(instruction_ids) != len(kwargs):
        raise InputError(f"need one mapping for each of {len(instruction_ids)} ids, got {len(kwargs)}", field="kwargs")
    checks = [_bound(i, *pair) for i, pair in enumerate(zip(instruction_ids, kwargs, strict=True))]
    readings = list(_loose_readings(response)) if loose else [response]
    return [any(reading.strip() != "" and check(reading) for reading in readings) for check in checks]


def instruction_reward(
    response: str, instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], loose: bool = False
) -> float:
    """Share of instructions that a response follows, 1 where there are none; arguments as of ``check_instructions``."""
    followed = check_instructions(response, instruction_ids, kwargs, loose)
    return sum(followed) / len(followed) if followed else 1.0


def all_instructions_reward(
    response: str, instruction_ids: Sequence[str], kwargs: Sequence[Mapping[str, Any]], loose: bool = False
) -> float:
    """1 where a response follows every instruction, else 0; arguments as of ``check_instructions``."""
    return float(all(check_instructions(response, instruction_ids, kwargs, loose)))


def prepare() -> None:
    """Load the model of languages, about half a second: the first check of a language would pay for it otherwise."""
    detect_language("the")


def count_sentences(text: str) -> int:
    """Number of sentences.

    One ends at a word that ends in ``. ! ?``, an ellipsis or the like of other scripts, whatever closing quotes,
    brackets or asterisks follow; not at a usual abbreviation, an initial (``J.``), nor the number of a list's item.
    Line breaks end no sentence; a rest without an end counts as one.
    """
    sentences, open_words = 0, False
    spaced = re.sub(r"([\u3002\uff01\uff1f\u0964]+)", r"\1 ", text)  # scripts that need no blank behind their marks
    for line in spaced.splitlines():
        for place, token in enumerate(line.split()):
            open_words = open_words or any(map(str.isalnum, token))
            if open_words and _ends_sentence(token, place == 0):
                sentences, open_words = sentences + 1, False
    return sentences + open_words


def detect_language(text: str) -> str:
    """Language of a text, as ISO 639-1 (or 639-3) code; of letters only, whose case does not matter."""
    return _language_model().classify(text.lower())[0]


def _ends_sentence(token: str, first: bool) -> bool:
    bare = token.rstrip(CLOSING)
    if not bare.endswith(SENTENCE_ENDS) or ABBREVIATION.fullmatch(bare.lstrip("\"'([*_")):
        return False
    return not (first and re.fullmatch(r"\d+\.", bare))


def _loose_readings(response: str) -> Iterator[str]:
    lines = response.split("\n")
    for part in (lines, lines[1:], lines[:-1], lines[1:-1]):
        reading = "\n".join(part)
        yield from (reading, reading.replace("*", ""))


def _bound(place: int, instruction_id: str, kwargs: Mapping[str, Any]) -> Callable[[str], bool]:
    """An instruction's check, with its arguments, which are verified first."""
    check = INSTRUCTIONS.get(instruction_id)
    if check is None:
        known = ", ".join(sorted(INSTRUCTIONS))
        raise InputError(
            f"need a known instruction, got '{instruction_id}'; known: {known}", field=f"instruction_ids[{place}]"
        )
    arguments: dict[str, Any] = {}
    for name, parameter in list(signature(check).parameters.items())[1:]:
        value = kwargs.get(name)
        wanted = _unmet(value, name, parameter.annotation)
        if wanted:
            raise InputError(f"'{instruction_id}' needs {wanted}, got {value!r}", field=f"kwargs[{place}].{name}")
        arguments[name] = value
    return lambda response: check(response, **arguments)


def _unmet(value: object, name: str, annotation: object) -> str:
    """What an argument should be and is not."""
    if annotation is int:
        met, wanted = value.is_integer() if isinstance(value, float) else type(value) is int, "a whole number"
    elif annotation is str:
        met, wanted = isinstance(value, str) and value != "", "text"
    else:
        met = isinstance(value, list | tuple) and all(isinstance(word, str) for word in value)
        wanted = "a list of words"
    if met and name.endswith("relation"):
        met, wanted = value in RELATIONS, f"one of {RELATIONS}"
    if met and name == "language":
        met, wanted = _base(str(value)) in _languages(), "the code of a language that can be detected"
    return "" if met else wanted


@cache
def _languages() -> frozenset[str]:
    return frozenset(code for code, _ in _language_model().rank(""))


def _language_model() -> ModuleType:
    import py3langid  # type: ignore[import-untyped]

    return py3langid


def _base(code: str) -> str:
    """Without its region: detection tells no ``zh-tw`` from ``zh-cn``."""
    return code.lower().partition("-")[0]


def _holds(count: int, relation: str, number: int) -> bool:
    return count < number if relation == "less than" else count >= number


def _english(response: str) -> bool:
    return detect_language(response) == "en"


def _existence(response: str, keywords: Sequence[str]) -> bool:
    return all(keyword.lower() in response.lower() for keyword in keywords)


def _frequency(response: str, keyword: str, frequency: int, relation: str) -> bool:
    return _holds(response.lower().count(keyword.lower()), relation, frequency)


def _forbidden_words(response: str, forbidden_words: Sequence[str]) -> bool:
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def _letter_frequency(response: str, letter: str, let_frequency: int, let_relation: str) -> bool:
    return _holds(response.lower().count(letter.lower()), let_relation, let_frequency)


def _response_language(response: str, language: str) -> bool:
    return detect_language(response) == _base(language)


def _number_sentences(response: str, num_sentences: int, relation: str) -> bool:
    return _holds(count_sentences(response), relation, num_sentences)


def _number_words(response: str, num_words: int, relation: str) -> bool:
    return _holds(len(re.findall(r"\w+", response)), relation, num_words)


def _number_paragraphs(response: str, num_paragraphs: int) -> bool:
    parts = _parts(response, "***")
    return len(parts) == num_paragraphs and all(parts)


def _nth_paragraph_first_word(response: str, first_word: str, num_paragraphs: int, nth_paragraph: int) -> bool:
    paragraphs = [paragraph for paragraph in re.split(r"\n\s*\n", response) if paragraph.strip()]
    if len(paragraphs) != num_paragraphs or not 1 <= nth_paragraph <= num_paragraphs:
        return False
    word = paragraphs[int(nth_paragraph) - 1].split()[0].lstrip("'\"")
    return re.split("[.,?!'\"]", word)[0].lower() == first_word.lower()


def _parts(response: str, divider: str) -> list[str]:
    """What lies between dividers, of which one may open and one may close the response."""
    parts = [part.strip() for part in response.split(divider)]
    return parts[len(parts) > 1 and not parts[0] : len(parts) - (len(parts) > 1 and not parts[-1])]


def _number_placeholders(response: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[[^\[\]\n]*\]", response)) >= num_placeholders


def _postscript(response: str, postscript_marker: str) -> bool:
    blanks_between = {"P.S.": r"p\.\s?s\.", "P.P.S": r"p\.\s?p\.\s?s"}
    pattern = blanks_between.get(postscript_marker, re.escape(postscript_marker.lower()))
    return re.search(pattern, response.lower()) is not None


def _number_bullet_lists(response: str, num_bullets: int) -> bool:
    return len(re.findall(r"^[ \t]*(?:\*(?!\*)|-(?!-))[ \t]*\S", response, re.MULTILINE)) == num_bullets


def _number_highlighted_sections(response: str, num_highlights: int) -> bool:
    sections = re.findall(r"\*\*[^\n*]*\*\*|\*[^\n*]*\*", response)
    return sum(section.strip("* \t") != "" for section in sections) >= num_highlights


def _multiple_sections(response: str, section_spliter: str, num_sections: int) -> bool:
    return len(re.findall(rf"{re.escape(section_spliter)}\s?\d+", response)) >= num_sections


def _constrained_response(response: str) -> bool:
    return any(choice in response for choice in CONSTRAINED_RESPONSES)


def _json_format(response: str) -> bool:
    fenced = re.fullmatch(r"```(?:json)?(.*)```", response.strip(), re.DOTALL | re.IGNORECASE)
    try:
        json.loads(fenced.group(1) if fenced else response)
    except (ValueError, RecursionError):
        return False
    return True


def _title(response: str) -> bool:
    lines = ((line, line.find("<<"), line.rfind(">>")) for line in response.splitlines())
    return any(0 <= start < end and line[start:end].strip("<> \t") for line, start, end in lines)


def _two_responses(response: str) -> bool:
    parts = _parts(response, "******")
    return len(parts) == 2 and all(parts) and parts[0] != parts[1]


def _repeat_prompt(response: str, prompt_to_repeat: str) -> bool:
    return response.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _end_checker(response: str, end_phrase: str) -> bool:
    return response.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _quotation(response: str) -> bool:
    return re.fullmatch(r'".*"', response.strip(), re.DOTALL) is not None


def _capital_word_frequency(response: str, capital_frequency: int, capital_relation: str) -> bool:
    words = re.findall(r"\w+(?:['\u2019.-]\w+)*", response)  # WELL-KNOWN and U.S are one word each
    return _holds(sum(map(str.isupper, words)), capital_relation, capital_frequency)


def _english_capital(response: str) -> bool:
    return response.isupper() and _english(response)


def _english_lowercase(response: str) -> bool:
    return response.islower() and _english(response)


def _no_comma(response: str) -> bool:
    return "," not in response


INSTRUCTIONS: dict[str, Callable[..., bool]] = {  # the parameters' names are the names in the data
    "change_case:capital_word_frequency": _capital_word_frequency,
    "change_case:english_capital": _english_capital,
    "change_case:english_lowercase": _english_lowercase,
    "combination:repeat_prompt": _repeat_prompt,
    "combination:two_responses": _two_responses,
    "detectable_content:number_placeholders": _number_placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:constrained_response": _constrained_response,
    "detectable_format:json_format": _json_format,
    "detectable_format:multiple_sections": _multiple_sections,
    "detectable_format:number_bullet_lists": _number_bullet_lists,
    "detectable_format:number_highlighted_sections": _number_highlighted_sections,
    "detectable_format:title": _title,
    "keywords:existence": _existence,
    "keywords:forbidden_words": _forbidden_words,
    "keywords:frequency": _frequency,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _response_language,
    "length_constraints:nth_paragraph_first_word": _nth_paragraph_first_word,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_words": _number_words,
    "punctuation:no_comma": _no_comma,
    "startend:end_checker": _end_checker,
    "startend:quotation": _quotation,
}
