"""Countdown solved in written steps, with words between them that carry no meaning.

A response is a row of steps such as ``5+7=12`` and notes such as ``(3,12)``, with one or more of ``CONNECTORS`` between
any two, and perhaps before the first and behind the last: ``so 5+7=12 next(3,12) and 12*3=36 go(36)``. Blanks may
stand between numbers, signs and words, but nothing else may: the judge is strict.
"""

import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from typing import Literal, NamedTuple

CONNECTORS = ("so", "next", "and", "also", "do", "go")  # interchangeable; each is one token of every preset
MOST_CHARACTERS = 1000
Role = Literal["decision", "connector", "other"]
NUMBER = r"-?[1-9][0-9]{0,11}|0"
ITEM = re.compile(
    rf"(?P<word>[a-z]+)|\((?P<note>[0-9, -]+)\)"
    rf"|(?P<left>{NUMBER}) *(?P<operator>[-+*/]) *(?P<right>{NUMBER}) *= *(?P<result>{NUMBER})(?![0-9])"
)
WHOLE = re.compile(NUMBER)
LEXEME = re.compile(r"[a-z]+|[0-9]+|.", re.DOTALL)


class Form(NamedTuple):
    """An expression in a form that the order and the brackets of its sums and products do not change.

    Args:
        negative: It is minus what follows.
        kind: ``+`` of sums and differences, ``*`` of products and quotients, empty of a number.
        parts: Texts of what is added or multiplied, in order; True before what is subtracted or divided by.
    """

    negative: bool
    kind: str
    parts: tuple[tuple[str, bool], ...]

    def text(self) -> str:
        """The form in brackets, without its sign."""
        if not self.kind:
            return self.parts[0][0]
        signs = {False: self.kind, True: "-" if self.kind == "+" else "/"}
        return "(" + "".join(signs[inverse] + part for part, inverse in self.parts) + ")"


def steps_reward(response: str, numbers: Sequence[int], target: int) -> float:
    """1 where right steps turn all the numbers into the target, else 0.

    A step takes two numbers that are there, given ones or results, each once, and puts its result in their place. It
    has to be right, exactly, so a division has to come out even. A note has to name the numbers that are there, in any
    order. Only the target may be left.
    """
    left = _left(response, numbers)
    return float(left is not None and len(left) == 1 and left[0][0] == target)


def steps_answer(response: str, numbers: Sequence[int]) -> str | None:
    """What right steps compute from all the numbers: equal for steps that differ in order, brackets and words alone.

    None where the reward is 0 whatever the target.
    """
    left = _left(response, numbers)
    if left is None or len(left) != 1:
        return None
    form = left[0][1]
    return "-" * form.negative + form.text()


def _left(response: str, numbers: Sequence[int]) -> list[tuple[int, Form]] | None:
    """Numbers that a response leaves, at least one step taken, with how they came about; None where it is not right."""
    if len(response) > MOST_CHARACTERS:
        return None
    there = [(number, Form(False, "", ((str(number), False),))) for number in numbers]
    separate, steps = True, 0
    position = len(response) - len(response.lstrip(" "))
    while position < len(response):
        item = ITEM.match(response, position)
        if item is None or (item["word"] is not None and item["word"] not in CONNECTORS):
            return None
        if item["word"] is None:
            if not separate or not (_right_note(item["note"], there) if item["note"] else _take_step(item, there)):
                return None
            steps += item["note"] is None
        separate = item["word"] is not None
        position = item.end() + len(response[item.end() :]) - len(response[item.end() :].lstrip(" "))
    return there if steps else None


def _right_note(note: str, there: list[tuple[int, Form]]) -> bool:
    named = [part.strip(" ") for part in note.split(",")]
    return all(map(WHOLE.fullmatch, named)) and sorted(map(int, named)) == sorted(number for number, _ in there)


def _take_step(step: re.Match[str], there: list[tuple[int, Form]]) -> bool:
    """Replace a step's operands by its result, and say whether that is right; of equal numbers the latest is taken."""
    operands = []
    for number in (int(step["left"]), int(step["right"])):
        rows = [row for row, (other, _) in enumerate(there) if other == number]
        if not rows:
            return False
        operands.append(there.pop(rows[-1]))
    (left, one), (right, two) = operands
    operator, result = step["operator"], int(step["result"])
    if operator == "/" and right == 0:
        return False
    values = {"+": left + right, "-": left - right, "*": left * right}
    if (Fraction(left, right) if operator == "/" else values[operator]) != result:
        return False
    there.append((result, _joined(one, operator, two)))
    return True


def _joined(one: Form, operator: str, two: Form) -> Form:
    kind, inverse = ("+" if operator in "+-" else "*"), operator in "-/"
    parts = []
    for form, flipped in ((one, False), (two, inverse)):
        turned = flipped ^ (form.negative and kind == "+")
        own = form.parts if form.kind == kind else ((form.text(), False),)
        parts += [(text, turned ^ flag) for text, flag in own]
    if kind == "*":
        return Form(one.negative ^ two.negative, kind, tuple(sorted(parts, key=lambda part: (part[1], part[0]))))
    parts.sort()
    negative = parts[0][1]  # a sum and its opposite have the same parts
    return Form(negative, kind, tuple((text, flag ^ negative) for text, flag in parts))


def token_roles(pieces: Sequence[str], numbers: Sequence[int]) -> list[Role]:
    """What each token of a response is: a ``decision`` of the policy, a ``connector``, or ``other``.

    Decisions are the operators of steps, and the digits of operands at which the numbers that are there part: with 12
    and 15 to choose from, the second digit; with 1 and 12, the ``=`` behind 1. The last operand of the last step is
    forced, results and notes follow from what was written before. The response need not be right: wrong results count
    as numbers that are there from then on.

    Args:
        pieces: Text of each token; an empty one counts as a blank, as which tokenizers decode a blank alone.
        numbers: The numbers of the problem.
    """
    marks: list[Role] = []  # of each character
    text = "".join(piece or " " for piece in pieces)
    for length, role in _marked(text, numbers):
        marks += [role] * length
    roles: list[Role] = []
    start = 0
    for piece in pieces:
        own = marks[start : start + len(piece or " ")]
        start += len(own)
        found: Role = "decision" if "decision" in own else "other"
        roles.append("connector" if piece.strip() in CONNECTORS else found)
    return roles


def _marked(text: str, numbers: Sequence[int]) -> Iterator[tuple[int, Role]]:
    """Lengths and roles of the parts of a response, connectors left to the caller."""
    there = list(map(str, numbers))
    place, sign = "left", ""  # where in a step the next number stands
    end: Role = "other"  # of what follows the second operand
    for lexeme in LEXEME.findall(text):
        if lexeme.isdigit() and lexeme.isascii() and place in ("left", "right"):
            operand = sign + lexeme
            yield from ((1, _choice(operand, at, there)) for at in range(len(sign), len(operand)))
            place, sign, end = ("operator" if place == "left" else "equals"), "", _choice(operand, len(operand), there)
            if operand in there:
                there.remove(operand)
            continue
        if lexeme.isdigit() and lexeme.isascii() and place == "result":
            there.append(sign + lexeme)
            place, sign = "", ""
        elif lexeme == "-" and place in ("left", "right", "result") and not sign:
            sign = "-"
            yield 1, "other" if place == "result" else _choice("-", 0, there)
            continue
        elif lexeme in "+-*/" and place == "operator":
            place = "right"
            yield 1, "decision"
            continue
        elif lexeme == "=" and place == "equals":
            place = "result"
            yield 1, end
            continue
        elif lexeme == "(":
            place = "note"
        elif lexeme.isalpha():
            place, sign = "left", ""
        yield len(lexeme), "other"


def _choice(operand: str, at: int, there: list[str]) -> Role:
    """Whether more than one character could follow the first ``at`` of an operand."""
    begun = [number for number in there if number.startswith(operand[:at])]
    return "decision" if len({number[at : at + 1] for number in begun}) > 1 else "other"
