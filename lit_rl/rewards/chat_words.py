"""Chat on a small vocabulary: a fixed scorer in place of a reward model, which favours long and varied texts that end.

A response is words of ``WORDS`` and a full stop. Its reward is

    1/4 min(1, words / 16) + 1/2 min(1, different words / 16) + 1/4 (share of the prompt's topics that it names)

and 0 where it does not end in a full stop, has a full stop before, or anything else than words and blanks.
"""

import re
from collections.abc import Sequence

VOCABULARY = (  # each is one token of every preset
    "cat sun sea man star light snow wood gold silver metal field plant vine stream earth school port ring "
    "bull cow band bar block sign net mud sum new black far next empty sing spin fight hide keep need teach"
)
WORDS = tuple(VOCABULARY.split(" "))
WANTED = 16  # words, all of them different, from which on a text is long and varied enough
MOST_CHARACTERS = 1000
TEXT = re.compile(r"\s*([a-z]+(?: [a-z]+)*) ?\.\s*")
KNOWN = frozenset(WORDS)


def chat_prompt(topics: Sequence[str]) -> str:
    """``["sea", "star"]`` as ``chat sea star:``."""
    return f"chat {' '.join(topics)}:"


def chat_answer(response: str) -> str | None:
    """The words of a response; None where it does not end, or breaks the form."""
    found = TEXT.fullmatch(response) if len(response) <= MOST_CHARACTERS else None
    return None if found is None else found.group(1)


def chat_reward(response: str, topics: Sequence[str]) -> float:
    """Reward in ``[0, 1]``, see above; words that are not of the vocabulary do not count.

    Args:
        response: Text of a response.
        topics: Words that it should name, at least one.
    """
    text = chat_answer(response)
    words = [word for word in text.split(" ") if word in KNOWN] if text else []
    if not words:
        return 0.0
    different = set(words)
    named = sum(topic in different for topic in topics) / max(1, len(topics))
    return min(1.0, len(words) / WANTED) / 4 + min(1.0, len(different) / WANTED) / 2 + named / 4
