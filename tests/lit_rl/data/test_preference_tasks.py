import re
from collections import Counter

import pytest

from lit_core.errors import InputError
from lit_rl.data.preference_tasks import (
    NUMBERS,
    REFUSALS,
    WORDS,
    PreferenceTask,
    PreferenceTaskConfig,
    preference_tasks,
)

TASKS = preference_tasks(PreferenceTaskConfig(count=2000))


def breaches(task: PreferenceTask, reply: str) -> set[str]:
    """What a reply breaks, by reading both texts anew."""
    if reply in REFUSALS:
        return {"refusal"}
    (kind,) = [name for name in WORDS if name in task.request]
    (number,) = [n for n, word in NUMBERS.items() if f" {word} " in task.request]
    every = {word: name for name, words in WORDS.items() for word in words}
    words = [word for word in re.findall(r"[A-Za-z]+", reply.partition(": ")[2] or reply) if word.lower() in every]
    found = set[str]()
    if {every[word.lower()] for word in words} != {kind}:
        found.add("kind")
    if len(words) != number or len(set(words)) != number:
        found.add("count")
    wanted = re.search(r"one of them (\w+)", task.request)
    banned = re.search(r"but not (\w+)", task.request)
    capitals = "capital letters" in task.request
    if (wanted and wanted[1] not in words) or (banned and banned[1] in words) or capitals != words[0].isupper():
        found.add("condition")
    return found


def test_the_better_reply_breaks_nothing_and_the_worse_one_what_it_says() -> None:
    for task in TASKS:
        assert not breaches(task, task.chosen), task
        assert task.breach in breaches(task, task.rejected), task
        if task.breach == "count":
            assert breaches(task, task.rejected) == {"count"}, task


def test_replies_tell_little_without_their_request() -> None:
    assert {task.breach for task in TASKS} == {"kind", "count", "condition", "refusal"}
    told = [task for task in TASKS if task.breach != "refusal"]
    longer = [(len(t.chosen) > len(t.rejected)) + 0.5 * (len(t.chosen) == len(t.rejected)) for t in told]
    assert sum(longer) / len(longer) == pytest.approx(0.5, abs=0.03)
    better, worse = (
        Counter(word for task in told for word in re.findall(r"[a-z]+", getattr(task, side).lower()))
        for side in ("chosen", "rejected")
    )
    for word in ("apple", "hammer", "sure", "example"):
        assert better[word] / worse[word] == pytest.approx(1, abs=0.4)


def test_equal_configurations_give_equal_tasks() -> None:
    again = preference_tasks(PreferenceTaskConfig(count=2000))
    assert again == TASKS
    assert len({task.request for task in TASKS}) == 2000
    assert preference_tasks(PreferenceTaskConfig(seed=1, count=50)) != TASKS[:50]
    first = TASKS[0]
    assert first.dialogue("R") == f"\n\nHuman: {first.request}\n\nAssistant: R"


@pytest.mark.slow
def test_counts_out_of_range() -> None:
    with pytest.raises(InputError, match=r"tasks\.count.*got 9"):
        PreferenceTaskConfig(count=9)
    with pytest.raises(InputError, match="different requests were found"):
        preference_tasks(PreferenceTaskConfig(count=100_000))
