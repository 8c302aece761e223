"""Tasks: what a row of data asks, what its reward is, and which part of a response is the answer."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lit_core.errors import InputError
from lit_rl.rewards.arithmetic import evaluate
from lit_rl.rewards.chat_words import chat_answer, chat_prompt, chat_reward
from lit_rl.rewards.constraints import constraints_prompt
from lit_rl.rewards.countdown import ANSWER, countdown_reward, expression_reward
from lit_rl.rewards.countdown_steps import steps_answer, steps_reward
from lit_rl.rewards.instructions import all_instructions_reward, check_instructions, instruction_reward
from lit_rl.rewards.math import final_answer, gold_answer, math_reward
from lit_rl.rewards.sums import sums_answer, sums_prompt, sums_reward

Row = Mapping[str, Any]
COUNTDOWN_PROMPT = (
    "Using the numbers {numbers}, write an expression that equals {target}. You may use +, -, *, / and brackets, and "
    "every number exactly once. Think inside <think> </think> and give the expression inside <answer> </answer>, for "
    "example <answer>(1 + 2) / 3</answer>."
)
MATH_PROMPT = "{question}\n\nReason step by step, and put the final answer inside \\boxed{{}}."


@dataclass(frozen=True)
class Task:
    """How rows of one kind become prompts and rewards.

    Args:
        prompt: Text of the prompt; raises ``InputError`` with the field that a row lacks.
        reward: Reward of a response.
        answer: The part of a response that answers, in a form in which equal answers are equal; None where a response
            has none, or one that breaks the rules of the task.
        slow: Whether the reward is computed in worker processes, with a time limit.
    """

    prompt: Callable[[Row], str]
    reward: Callable[[Row, str], float]
    answer: Callable[[Row, str], str | None]
    slow: bool = False


def field(row: Row, *names: str) -> Any:
    """Value of the first of several names that a row has.

    Raises:
        InputError: It has none of them, or an empty text.
    """
    for name in names:
        if row.get(name) is not None:
            if isinstance(row[name], str) and not row[name].strip():
                raise InputError("is empty", field=name)
            return row[name]
    raise InputError(f"is missing; the row has {', '.join(row) or 'no field'}", field=" or ".join(names))


def reward(task: str, row: Row, response: str) -> float:
    """Reward of a response to a row of a task, by the task's name."""
    return TASKS[task].reward(row, response)


def prepare() -> None:
    """Import what slow rewards need, before the clock of the first one runs."""
    from lit_rl.rewards import instructions, math

    math.prepare()
    instructions.prepare()


def _countdown(row: Row) -> tuple[list[int], int]:
    numbers, target = field(row, "numbers", "nums"), field(row, "target")
    whole = isinstance(numbers, list) and numbers and all(type(number) is int for number in numbers)
    if not whole or type(target) is not int:
        raise InputError(
            f"need a list of whole numbers and a whole target, got {numbers} and {target}", field="numbers"
        )
    return numbers, target


def _countdown_prompt(row: Row) -> str:
    numbers, target = _countdown(row)
    return COUNTDOWN_PROMPT.format(numbers=numbers, target=target)


def _bare_prompt(row: Row) -> str:
    numbers, target = _countdown(row)
    return f"{','.join(map(str, numbers))}={target}:"


def _countdown_answer(row: Row, response: str) -> str | None:
    found = ANSWER.search(response)
    return None if found is None else _expression(row, found.group(1))


def _expression(row: Row, text: str) -> str | None:
    """An expression without blanks, if it uses the row's numbers as the rules say."""
    found = evaluate(text)
    numbers = sorted(_countdown(row)[0])
    return None if found is None or sorted(found.numbers) != numbers else re.sub(r"\s", "", text)


def _instructions_prompt(row: Row) -> str:
    check_instructions("", field(row, "instruction_id_list"), field(row, "kwargs"))
    return field(row, "prompt")


def _sums(row: Row) -> list[int]:
    numbers = field(row, "numbers")
    if not isinstance(numbers, list) or not numbers or any(type(number) is not int for number in numbers):
        raise InputError(f"need a list of whole numbers, got {numbers}", field="numbers")
    return numbers


def _topics(row: Row) -> list[str]:
    topics = field(row, "topics")
    if not isinstance(topics, list) or not topics or any(not isinstance(topic, str) for topic in topics):
        raise InputError(f"need a list of words, got {topics}", field="topics")
    return topics


def _share_of_instructions(row: Row, response: str) -> float:
    return instruction_reward(response, row["instruction_id_list"], row["kwargs"])


TASKS: dict[str, Task] = {
    "countdown": Task(
        _countdown_prompt, lambda row, response: countdown_reward(response, *_countdown(row)), _countdown_answer
    ),
    "countdown_compatible": Task(
        _countdown_prompt,
        lambda row, response: countdown_reward(response, *_countdown(row), compatible=True),
        _countdown_answer,
    ),
    "countdown_bare": Task(  # for models of a few thousand parameters: numbers and target, then the expression alone
        _bare_prompt, lambda row, response: expression_reward(response, *_countdown(row)), _expression
    ),
    "countdown_steps": Task(  # for the same models: written steps, with words between them that may be swapped
        _bare_prompt,
        lambda row, response: steps_reward(response, *_countdown(row)),
        lambda row, response: steps_answer(response, _countdown(row)[0]),
    ),
    "math": Task(
        lambda row: MATH_PROMPT.format(question=field(row, "question", "problem", "prompt")),
        lambda row, response: math_reward(response, gold_answer(str(field(row, "answer", "solution")))),
        lambda row, response: final_answer(response),
        slow=True,
    ),
    "instructions": Task(
        _instructions_prompt,
        lambda row, response: all_instructions_reward(response, row["instruction_id_list"], row["kwargs"]),
        lambda row, response: response.strip() or None,
        slow=True,
    ),
    "instructions_share": Task(  # partial credit, as MGS trains with: the share of instructions that are followed
        _instructions_prompt, _share_of_instructions, lambda row, response: response.strip() or None, slow=True
    ),
    "sums": Task(  # the built-in domains, for models of a few thousand parameters
        lambda row: sums_prompt(_sums(row)),
        lambda row, response: sums_reward(response, _sums(row)),
        lambda row, response: sums_answer(response),
    ),
    "chat_words": Task(
        lambda row: chat_prompt(_topics(row)),
        lambda row, response: chat_reward(response, _topics(row)),
        lambda row, response: chat_answer(response),
    ),
    "constraints": Task(
        lambda row: constraints_prompt(field(row, "instruction_id_list"), field(row, "kwargs")),
        _share_of_instructions,
        lambda row, response: response.strip() or None,
    ),
    "preference": Task(  # a reward model scores the dialogue; see the methods' ``reward_model``
        lambda row: str(field(row, "prompt")), lambda row, response: 0.0, lambda row, response: response.strip() or None
    ),
}
