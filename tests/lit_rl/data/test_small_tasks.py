from statistics import fmean
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_rl.data.small_tasks import GENERATORS, SmallTaskConfig, small_problems, split_problems
from lit_rl.rewards.tasks import TASKS


@pytest.mark.parametrize("task", GENERATORS)
def test_problems_differ_repeat_by_seed_and_are_short(task: str) -> None:
    rows = small_problems(task, SmallTaskConfig(count=300))
    assert rows == small_problems(task, SmallTaskConfig(count=300))
    assert rows != small_problems(task, SmallTaskConfig(seed=1, count=300))
    prompts = [TASKS[task].prompt(row) for row in rows]
    assert len(set(prompts)) == 300
    tokenizer: Any = preset_tokenizer("nano-qwen3")
    assert max(map(len, tokenizer(prompts)["input_ids"])) <= 24
    assert max(len(tokenizer(row["solution"])["input_ids"]) for row in rows) <= 24
    splits = split_problems(task, SmallTaskConfig(count=280), 10)
    assert {name: len(part) for name, part in splits.items()} == {"train": 280, "val": 10, "test": 10}
    assert [*splits["test"], *splits["val"], *splits["train"]] == rows


def test_solutions_are_right_but_those_of_chat_leave_room() -> None:
    config = SmallTaskConfig(count=300)
    rewards = {
        task: [TASKS[task].reward(row, row["solution"]) for row in small_problems(task, config)] for task in GENERATORS
    }
    assert set(rewards["sums"]) == {1.0}
    assert set(rewards["constraints"]) == {1.0}
    assert 0.3 < fmean(rewards["chat_words"]) < 0.5
    assert min(rewards["chat_words"]) > 0
    assert max(rewards["chat_words"]) < 0.9


def test_mistakes() -> None:
    with pytest.raises(InputError, match=r"field 'small.most_terms': must be between 3 and 9, got 2"):
        SmallTaskConfig(most_terms=2)
    with pytest.raises(InputError, match="only 9 different problems of sums exist"):
        small_problems("sums", SmallTaskConfig(count=10, least_terms=1, most_terms=1))
