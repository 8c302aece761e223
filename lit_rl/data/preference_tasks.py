"""Requests with a reply that follows them and one that does not, from a seed: preferences without a download.

A request asks for some words of a kind, often under a condition. The worse reply breaks one thing that was asked, or
refuses. Better and worse replies have the same words, as many of them, as often, so that a reply tells nothing by its
length and little by its words: it has to be read against its request. Refusals alone give themselves away.
"""

import random
from dataclasses import dataclass

from lit_core.errors import InputError

KINDS = {
    "fruits": "apple banana cherry grape lemon mango melon orange peach pear plum fig",
    "animals": "cat dog horse cow sheep goat lion tiger bear wolf fox rabbit",
    "colours": "red blue green yellow black white pink brown grey purple violet gold",
    "tools": "hammer saw drill knife axe shovel ladder rope brush needle wrench nail",
    "drinks": "water milk tea coffee juice beer wine cider cocoa soda rum gin",
    "clothes": "shirt coat hat shoe sock scarf glove dress skirt belt jacket boot",
}
WORDS = {kind: tuple(words.split()) for kind, words in KINDS.items()}
NUMBERS = {2: "two", 3: "three", 4: "four"}
GREETINGS = ("", "Hello. ", "Good morning. ", "One more question. ", "Now something else. ")
REQUESTS = ("Name {n} {kind}{condition}.", "Please list {n} {kind}{condition}.", "Give me {n} {kind}{condition}.",
            "I need {n} {kind}{condition}.", "Can you tell me {n} {kind}{condition}?",
            "Write down {n} {kind}{condition}.", "What are {n} {kind}{condition}?")  # fmt: skip
CONDITIONS = {"": "", "with": ", one of them {word}", "without": ", but not {word}", "capitals": " in capital letters"}
REPLIES = ("{words}.", "Here you are: {words}.", "Sure: {words}.", "{words}, for example.", "I would say {words}.")
REFUSALS = ("I would rather not say.", "That is none of my business.", "No, find it out yourself.", "I do not care.")
BREACHES = ("kind", "count", "condition", "refusal")
BREACH_WEIGHTS = (4, 3, 4, 1)
PROMPT, REPLY = "\n\nHuman: {}", "\n\nAssistant: {}"
MOST_DRAWS = 2000  # in a row without a new request


@dataclass(frozen=True)
class PreferenceTaskConfig:
    """Everything the built-in preferences depend on.

    Args:
        seed: Seed of all draws; not that of the run, so that all runs are tested alike.
        count: Pairs, each with a request of its own.

    Raises:
        InputError: A field is out of range.
    """

    seed: int = 0
    count: int = 4000

    def __post_init__(self) -> None:
        if not 10 <= self.count <= 10**5:
            raise InputError(f"must be between 10 and {10**5}, got {self.count}", field="tasks.count")


@dataclass(frozen=True)
class PreferenceTask:
    """A request, the better and the worse reply, and what is wrong with the worse one (one of ``BREACHES``)."""

    request: str
    chosen: str
    rejected: str
    breach: str

    def dialogue(self, reply: str) -> str:
        """Request and reply as one text, laid out as Anthropic's HH data."""
        return PROMPT.format(self.request) + REPLY.format(reply)


def preference_tasks(config: PreferenceTaskConfig) -> list[PreferenceTask]:
    """Draw pairs with different requests; equal configurations give equal ones.

    Raises:
        InputError: There are not as many different ones.
    """
    rng = random.Random(f"preferences/{config.seed}")
    found: dict[str, PreferenceTask] = {}
    misses = 0
    while len(found) < config.count:
        task = _draw(rng)
        misses = misses + 1 if task.request in found else 0
        found.setdefault(task.request, task)
        if misses > MOST_DRAWS:
            raise InputError(f"only {len(found)} different requests were found", field="tasks.count")
    return list(found.values())


def _draw(rng: random.Random) -> PreferenceTask:
    kind, number, condition = rng.choice(list(WORDS)), rng.choice(list(NUMBERS)), rng.choice(list(CONDITIONS))
    word = rng.choice(WORDS[kind])
    request = rng.choice(GREETINGS) + rng.choice(REQUESTS).format(
        n=NUMBERS[number], kind=kind, condition=CONDITIONS[condition].format(word=word)
    )
    chosen = _reply(rng, kind, number, condition, word)
    breaches = [name for name in BREACHES if name != "condition" or condition]
    breach = rng.choices(breaches, [BREACH_WEIGHTS[BREACHES.index(name)] for name in breaches])[0]
    if breach == "refusal":
        rejected = rng.choice(REFUSALS)
    elif breach == "kind":
        other = rng.choice([name for name in WORDS if name != kind])
        rejected = _reply(rng, other, number, condition, rng.choice(WORDS[other]))
    elif breach == "count":
        rejected = _reply(rng, kind, rng.choice([n for n in NUMBERS if n != number]), condition, word)
    else:
        broken = {"with": "without", "without": "with", "capitals": ""}[condition]
        rejected = _reply(rng, kind, number, broken, word)
    return PreferenceTask(request, chosen, rejected, breach)


def _reply(rng: random.Random, kind: str, number: int, condition: str, word: str) -> str:
    others = [other for other in WORDS[kind] if other != word]
    if condition == "with":
        words = [word, *rng.sample(others, number - 1)]
    elif condition == "without":
        words = rng.sample(others, number)
    else:
        words = rng.sample(WORDS[kind], number)
    rng.shuffle(words)
    words = [other.upper() for other in words] if condition == "capitals" else words
    return rng.choice(REPLIES).format(words=", ".join(words))
