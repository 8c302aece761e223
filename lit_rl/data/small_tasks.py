"""Problems of the built-in domains from a seed: sums, chat on a small vocabulary, constraints; solutions to imitate.

They pull a policy in opposed directions: one short exact answer, long and varied texts, texts as their prompt says.
The solutions are a start and no ideal: those of chat are short and use a few words much more often than the others.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from lit_core.errors import InputError
from lit_rl.rewards.chat_words import WORDS
from lit_rl.rewards.constraints import constraints_prompt

NAMED = WORDS[:10]  # words that constraints ask for or forbid: few, as copying any word takes long to learn
MOST_DRAWS = 2000  # in a row without a new problem
Row = dict[str, Any]  # the fields of its task, and a solution


@dataclass(frozen=True)
class SmallTaskConfig:
    """Everything the problems depend on.

    Args:
        seed: Seed of all draws.
        count: Problems.
        least_terms: Fewest numbers of a sum.
        most_terms: Most numbers of a sum.
        largest_number: Its numbers lie between 1 and this.
        topics: Words that a chat is about.
        longest_chat: Most words of a solution of chat.
        longest_text: Most words that a constraint asks for, and that a solution of constraints has.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    count: int = 1000
    least_terms: int = 3
    most_terms: int = 4
    largest_number: int = 9
    topics: int = 3
    longest_chat: int = 12
    longest_text: int = 10

    def __post_init__(self) -> None:
        for name, low, high in (
            ("count", 1, 10**7),
            ("least_terms", 1, 9),
            ("most_terms", self.least_terms, 9),
            ("largest_number", 1, 10**9),
            ("topics", 1, 8),
            ("longest_chat", self.topics, 30),
            ("longest_text", 4, 30),
        ):
            if not low <= (value := getattr(self, name)) <= high:
                raise InputError(f"must be between {low} and {high}, got {value}", field=f"small.{name}")


def small_problems(task: str, config: SmallTaskConfig) -> list[Row]:
    """Rows of a task whose prompts differ; equal configurations give equal ones.

    Args:
        task: Key of ``GENERATORS``.
        config: How many, and how large.

    Raises:
        InputError: There are not as many different ones.
    """
    rng = random.Random(f"{task}/{config.seed}")
    found: dict[str, Row] = {}
    misses = 0
    while len(found) < config.count:
        key, row = GENERATORS[task](rng, config)
        misses = misses + 1 if key in found else 0
        found.setdefault(key, row)
        if misses > MOST_DRAWS:
            raise InputError(f"only {len(found)} different problems of {task} exist in these ranges", field="small")
    return list(found.values())


def split_problems(task: str, config: SmallTaskConfig, held_out: int) -> dict[str, list[Row]]:
    """Rows for training, as many as the configuration says, and ``held_out`` others for each evaluation."""
    rows = small_problems(task, replace(config, count=config.count + 2 * held_out))
    return {"test": rows[:held_out], "val": rows[held_out : 2 * held_out], "train": rows[2 * held_out :]}


def _sum(rng: random.Random, config: SmallTaskConfig) -> tuple[str, Row]:
    terms = rng.randint(config.least_terms, config.most_terms)
    numbers = [rng.randint(1, config.largest_number) for _ in range(terms)]
    return str(numbers), {"numbers": numbers, "solution": str(sum(numbers))}


def _frequent(rng: random.Random, count: int) -> list[str]:
    """Words, the first of the vocabulary much more often than the last."""
    return rng.choices(WORDS, [1 / (1 + rank) for rank in range(len(WORDS))], k=count)


def _chat(rng: random.Random, config: SmallTaskConfig) -> tuple[str, Row]:
    topics = rng.sample(WORDS, config.topics)
    spoken = [topic for topic in topics if rng.random() < 0.5]
    words = spoken + _frequent(rng, rng.randint(config.topics, config.longest_chat) - len(spoken))
    rng.shuffle(words)
    return " ".join(sorted(topics)), {"topics": topics, "solution": f"{' '.join(words)}."}


def _constraints(rng: random.Random, config: SmallTaskConfig) -> tuple[str, Row]:
    wanted = rng.sample(NAMED, rng.randint(1, 2))
    unwanted = [rng.choice([word for word in NAMED if word not in wanted])]
    bound, short = rng.randint(3, config.longest_text), rng.random() < 0.5
    clauses: list[tuple[str, Row]] = [
        ("keywords:existence", {"keywords": wanted}),
        ("keywords:forbidden_words", {"forbidden_words": unwanted}),
        ("length_constraints:number_words",
         {"relation": "less than" if short else "at least", "num_words": bound + short}),
        ("punctuation:no_comma", {}),
    ]  # fmt: skip
    chosen = [0, *sorted(rng.sample(range(1, 4), rng.randint(1, 2)))]  # a word to name is what has to be learned
    least, most = len(wanted), config.longest_text
    if 2 in chosen:
        least, most = (least, bound) if short else (bound, config.longest_text)
    count = rng.randint(least, most)
    others = [word for word in WORDS if word not in unwanted]
    words = wanted + [rng.choice(others) for _ in range(count - len(wanted))]
    rng.shuffle(words)
    comma = "" if 3 in chosen else ","
    text = words[0] + "".join((comma if rng.random() < 0.3 else "") + " " + word for word in words[1:])
    ids, kwargs = [clauses[i][0] for i in chosen], [clauses[i][1] for i in chosen]
    key = constraints_prompt(ids, kwargs)
    return key, {"instruction_id_list": ids, "kwargs": kwargs, "solution": f"{text}."}


GENERATORS: dict[str, Callable[[random.Random, SmallTaskConfig], tuple[str, Row]]] = {
    "sums": _sum,
    "chat_words": _chat,
    "constraints": _constraints,
}
