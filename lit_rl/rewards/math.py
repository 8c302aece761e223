r"""Is a mathematical answer right: GSM8K's ``#### 72``, MATH's ``\boxed{72}``, or a bare one.

Numbers are compared exactly and never leave this file. Other answers go to ``math_verify``, which brings sympy; it runs
without its own time limits, which need signals and so fail in threads: what a model wrote belongs in ``RewardWorkers``.
"""

import logging
import re
from fractions import Fraction
from itertools import accumulate, product
from math import prod

MOST_CHARACTERS = 300  # longer answers are compared as text only
MOST_EXPONENT = 10_000  # product of the whole numbers within one exponent
MOST_POWER = 1_000_000  # product of these over all powers of numbers and brackets: about the digits of the value
MOST_DEPTH = 20  # of brackets, open ones too: the parser's time grows fast with it
TOLERANCE = Fraction(1, 10**6)  # relative, where a fraction without an end (1/3) meets a decimal number (0.333333)

BOX = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*(?:\{|([+-]?\d[\d.,/]*|[a-zA-Z]\b))|\\.|[{}]", re.DOTALL | re.ASCII)
PLAIN = r"(?:(?<![\w)\]}])[+-])?\\?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?(?:/\d+)?(?:\s?\\?%)?"
PLAIN_NUMBER = re.compile(PLAIN, re.ASCII)
HASHES = re.compile(rf"####\s*({PLAIN})", re.ASCII)

DECIMAL = r"[+-]?(?:(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d*)?|\.\d+)(?:[eE][+-]?\d{1,3})?"
# sign, whole part of a mixed number, above and below the line
NUMBER = re.compile(rf"([+-]?)\s*(?:(\d+)\s+)?({DECIMAL})(?:\s*/\s*({DECIMAL}))?", re.ASCII)
FRACTION = re.compile(rf"\\frac\s*\{{\s*({DECIMAL})\s*\}}\s*\{{\s*({DECIMAL})\s*\}}", re.ASCII)
TEN_TO_THE = r"10\s*\^\s*(?:\{\s*([+-]?\d{1,3})\s*\}|([+-]?\d{1,3}))(?![\d.])"
TIMES_POWER_OF_TEN = re.compile(rf"(?<=[\d.])\s*(?:\\times|\\cdot|\*|\u00d7)\s*{TEN_TO_THE}", re.ASCII)
POWER_OF_TEN = re.compile(rf"(?<![\w.)}}]){TEN_TO_THE}", re.ASCII)
PERCENT = re.compile(r"\s*(?:\\?%|percent)\s*\Z")
SCALES = {"hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
SCALE = re.compile(rf"\s*\b({'|'.join(SCALES)})\s*\Z")
MACRO = r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox|operatorname)\s*\{"
TEXT = re.compile(rf"{MACRO}([^{{}}]*)\}}")
UNIT_WORDS = (
    r"dollars?|cents?|degrees?|radians?|rad|units?|(?:milli|centi|kilo)?(?:meter|metre|gram|liter|litre)s?|mm|cm|km|kg|mL"
    r"|inch(?:es)?|foot|feet|ft|yards?|miles?|mph|seconds?|sec|minutes?|min|hours?|days?|weeks?|months?|years?"
    r"|people|students?|points?|ways|square|cubic|sq|per"
)
UNIT = re.compile(  # one at the end: any text that is no factor, or one of the words
    rf"\s*/?\s*(?:{MACRO}(?!\s*(?:percent|{'|'.join(SCALES)}))[^{{}}]*\}}|\b(?:{UNIT_WORDS})\b)"
    r"(?:\s*\^\s*\{?\s*-?\d\s*\}?)?[\s.]*\Z"
)

REWRITES = [  # of LaTeX that changes no value, in this order
    (re.compile(r"\\?\$|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\{,\}|,\\!"), ","),
    (re.compile(r"(?<=\d)\\[,!](?=\d{3}(?!\d))"), ""),
    (re.compile(r"\\(?:left|right|displaystyle|quad|qquad)(?![a-zA-Z])|(?<!\\)\\[,!;: ]|~"), " "),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\frac\s*(\d)\s*(\d)"), r"\\frac{\1}{\2}"),
    (re.compile(r"\\sqrt\s*(\d)"), r"\\sqrt{\1}"),
    (re.compile(r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree|°)"), ""),
    (re.compile("[\u2212\u2013]"), "-"),
]
ASSIGNMENT = re.compile(r"\s*((?:[A-Za-z]|\\[A-Za-z]+)(?:_\{?\w+\}?)?(?:\([A-Za-z]\))?)\s*=\s*([^=<>]+)")
# factorials and binomials of large numbers, factorials of factorials and powers, numbers with enormous exponents
COSTLY = re.compile(r"\d{5,}\s*!|!\s*!|[!^][^()]*[)}]\s*!|binom\s*\{\s*\d{5,}|[\d.][eE][+-]?\d{4}")


def math_reward(response: str, answer: str, last_number: bool = False) -> float:
    r"""1 where the response's final answer is the right one, else 0.

    Args:
        response: Its last box counts, so ``\boxed{8} or \boxed{7}`` answers 7; see ``final_answer``.
        answer: A GSM8K or MATH solution, or the bare answer; see ``gold_answer``.
        last_number: Take the response's last number where nothing else marks its answer.
    """
    found = final_answer(response, last_number)
    return float(found is not None and equivalent(gold_answer(answer), found))


def final_answer(text: str, last_number: bool = False) -> str | None:
    r"""Answer that a text marks as its own.

    Args:
        text: Read in one pass, whatever its length.
        last_number: Fall back on the last number, for answers in plain words; a fraction in LaTeX is not one.

    Returns:
        What stands in the last ``\boxed{...}`` or ``\fbox{...}`` whose braces close (of nested ones the innermost),
        else the number behind the last ``####``, else by flag the last number, else None.
    """
    box = _last_box(text)
    if box is not None:
        return box
    numbers = HASHES.findall(text) or (PLAIN_NUMBER.findall(text) if last_number else [])
    return numbers[-1] if numbers else None


def gold_answer(text: str) -> str:
    """Answer of a data set's row: marked as in ``final_answer``, or the whole text."""
    marked = final_answer(text)
    return text.strip() if marked is None else marked


def equivalent(gold: str, answer: str) -> bool:
    r"""Whether two answers are the same: as text, as exact numbers, or to ``math_verify``.

    ``5\%`` equals both 5 and 0.05, since gold answers use either form. Units behind a number, ``x=`` on one side only,
    thousands separators, degrees and dollars do not count. Answers that are too long to parse or too costly to
    evaluate are right only as text.
    """
    if max(len(gold), len(answer)) > MOST_CHARACTERS:
        return gold.split() == answer.split()
    gold, answer = _unassigned(_rewritten(gold), _rewritten(answer))
    if _text(gold) == _text(answer):
        return bool(_text(gold))
    golds, answers = _numbers(gold), _numbers(answer)
    if golds and answers:
        both_percent = len(golds) == len(answers) == 2
        return any(_equal(*pair) for pair in ([(golds[0], answers[0])] if both_percent else product(golds, answers)))
    return not _costly(gold) and not _costly(answer) and _symbolically_equal(gold, answer)


def prepare() -> None:
    """Load what answers other than numbers need, about half a second: the first of them would pay for it otherwise."""
    _symbolically_equal(r"\frac{x}{2} + \frac{x}{2}", "x")


def _last_box(text: str) -> str | None:
    opened: list[tuple[int, bool]] = []  # start of what each open brace holds, and whether a box opened it
    last_start, last = -1, None
    for token in BOX.finditer(text):
        bare = token.group(1)
        if bare is not None:
            last_start, last = token.start(1), bare
        elif token.group().endswith("{") and token.group() != r"\{":
            opened.append((token.end(), token.group() != "{"))
        elif token.group() == "}" and opened:
            start, boxed = opened.pop()
            if boxed and start > last_start:
                last_start, last = start, text[start : token.start()]
    return None if last is None else last.strip()


def _rewritten(text: str) -> str:
    for pattern, replacement in REWRITES:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".")


def _unassigned(gold: str, answer: str) -> tuple[str, str]:
    """Both without ``x =``, unless they assign to different names."""
    one, other = ASSIGNMENT.fullmatch(gold), ASSIGNMENT.fullmatch(answer)
    if one and other and _text(one.group(1)) != _text(other.group(1)):
        return gold, answer
    return one.group(2) if one else gold, other.group(2) if other else answer


def _text(text: str) -> str:
    """For comparison as text: no text macros, no blanks but between digits, no braces round a single character."""
    text = re.sub(r"([_^])\{(\w)\}", r"\1\2", TEXT.sub(r" \1 ", text).strip())
    return re.sub(r"(?<!\d)\s+|\s+(?!\d)", "", text)


def _numbers(text: str) -> tuple[Fraction, ...]:
    """Value of a number, both values of a percentage (5 and 0.05), nothing for anything else."""
    while (shorter := UNIT.sub("", text)) != text:
        text = shorter
    text = TEXT.sub(r" \1 ", text)
    percent = PERCENT.search(text) is not None
    text = PERCENT.sub("", text)
    scale = SCALE.search(text)
    text = TIMES_POWER_OF_TEN.sub(r"e\1\2", FRACTION.sub(r" \1/\2", SCALE.sub("", text)))
    found = NUMBER.fullmatch(POWER_OF_TEN.sub(r"1e\1\2", text).strip())
    if found is None:
        return ()
    sign, whole, above, below = found.groups()
    if (whole is not None and (below is None or above[0] in "+-")) or (below is not None and not _fraction(below)):
        return ()
    value = (int(whole) if whole else 0) + _fraction(above) / (_fraction(below) if below else 1)
    value *= (-1 if sign == "-" else 1) * (SCALES[scale.group(1)] if scale else 1)
    return (value, value / 100) if percent else (value,)


def _fraction(decimal: str) -> Fraction:
    return Fraction(decimal.replace(",", ""))


def _equal(gold: Fraction, answer: Fraction) -> bool:
    """Exactly, or to six digits where one of the two cannot be written as a decimal number."""
    one, other = (pow(10, value.denominator.bit_length(), value.denominator) != 0 for value in (gold, answer))
    near = abs(gold - answer) <= TOLERANCE * max(abs(gold), abs(answer))
    return gold == answer or (one != other and near)


def _costly(text: str) -> bool:
    """Whether reading or evaluating could take for ever: deep brackets, towers of powers, large factorials."""
    if max(accumulate((character in "([{") - (character in ")]}") for character in text), default=0) > MOST_DEPTH:
        return True
    text = text.replace("**", "^")
    power = 1
    for caret in re.finditer(r"\^\s*", text):
        exponent, rest = _group(text, caret.end())
        numbers = prod(int(digits) or 1 for digits in re.findall(r"\d+", exponent))
        variables = re.search(r"[a-zA-Z]", re.sub(r"\\[a-zA-Z]+", "", exponent))
        if numbers > MOST_EXPONENT or rest.startswith("^") or (not variables and re.search(r"[\^!]", exponent)):
            return True
        if re.search(r"[\d)}\]]\s*\Z", text[: caret.start()]):
            power *= numbers
    return power > MOST_POWER or COSTLY.search(text) is not None


def _group(text: str, start: int) -> tuple[str, str]:
    """Braced, bracketed or single exponent at a place, and what follows."""
    if text[start : start + 1] not in ("{", "("):
        single = re.compile(r"[+-]?\d+|\\[a-zA-Z]+|.?", re.DOTALL).match(text, start)
        end = start if single is None else single.end()
        return text[start:end], text[end:].lstrip()
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] in "{(") - (text[end] in "})")
        if depth == 0:
            return text[start + 1 : end], text[end + 1 :].lstrip()
    return text[start + 1 :], ""


def _symbolically_equal(gold: str, answer: str) -> bool:
    from math_verify import LatexExtractionConfig, parse, verify  # type: ignore[import-untyped]
    from sympy import nan, zoo  # type: ignore[import-untyped]

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the missing time limits
    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    parsed = []
    for text in (gold, answer):  # by its first match only: the others are parts of the answer
        parsed += parse(rf"\boxed{{{text}}}", latex, "no_fallback", "first_match", parsing_timeout=None)
    if len(parsed) < 2 or any(value.has(nan, zoo) for value in parsed):
        return False  # what is undefined equals everything
    return verify(parsed[0], parsed[1], timeout_seconds=None)
