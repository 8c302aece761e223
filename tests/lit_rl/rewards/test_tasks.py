import pytest

from lit_core.errors import InputError
from lit_rl.rewards.tasks import TASKS, reward

COUNTDOWN = {"numbers": [1, 2, 3], "target": 1}


def test_countdown_as_the_paper_poses_it() -> None:
    task = TASKS["countdown"]
    prompt = task.prompt(COUNTDOWN)
    assert "[1, 2, 3]" in prompt
    assert "equals 1." in prompt
    right = "<think>3 is 1 + 2</think> <answer>(1 + 2) / 3</answer>"
    assert task.reward(COUNTDOWN, right) == 1
    assert task.answer(COUNTDOWN, right) == "(1+2)/3"
    assert task.answer(COUNTDOWN, "<think></think><answer>3 - 2 - 1</answer>") == "3-2-1"  # wrong, but by the rules
    assert task.answer(COUNTDOWN, "<think></think><answer>3 - 2</answer>") is None
    assert task.answer(COUNTDOWN, "(1 + 2) / 3") is None


def test_bare_countdown() -> None:
    task = TASKS["countdown_bare"]
    assert task.prompt({"nums": [3, 5, 7], "target": 22}) == "3,5,7=22:"
    assert reward("countdown_bare", COUNTDOWN, " (1+2)/3") == 1
    assert reward("countdown_bare", COUNTDOWN, "1+2-3") == 0
    assert task.answer(COUNTDOWN, "3-2 -1") == "3-2-1"
    assert task.answer(COUNTDOWN, "3-2<|im_start|>-1") is None


def test_countdown_in_steps() -> None:
    task = TASKS["countdown_steps"]
    assert task.prompt({"nums": [3, 5, 7], "target": 36}) == "3,5,7=36:"
    assert reward("countdown_steps", COUNTDOWN, "so 1+2=3 do 3/3=1") == 1
    assert task.answer(COUNTDOWN, "so 2+1=3 do 3-3=0") == "(+1+2-3)"
    assert task.answer(COUNTDOWN, "so 2+1=3") is None


def test_math_reads_both_kinds_of_gold_answers() -> None:
    assert "How many?" in TASKS["math"].prompt({"question": "How many?"})
    assert reward("math", {"answer": "so 70 + 2\n#### 72"}, "it is \\boxed{72}") == 1
    assert reward("math", {"solution": "it is \\boxed{\\frac12}"}, "\\boxed{0.5}") == 1
    assert reward("math", {"answer": "72"}, "\\boxed{71}") == 0
    assert TASKS["math"].answer({}, "no box") is None


def test_instructions_need_all_of_them() -> None:
    row = {"prompt": "Say it.", "kwargs": [{}, {"num_bullets": 1}],
           "instruction_id_list": ["punctuation:no_comma", "detectable_format:number_bullet_lists"]}  # fmt: skip
    assert TASKS["instructions"].prompt(row) == "Say it."
    assert reward("instructions", row, "* one point") == 1
    assert reward("instructions", row, "* one, point") == 0


@pytest.mark.parametrize(
    ("task", "row", "field"),
    [
        ("countdown", {"target": 3}, "numbers or nums"),
        ("countdown", {"numbers": [1, 2]}, "target"),
        ("countdown", {"numbers": [1.5], "target": 3}, "numbers"),
        ("math", {"answer": "3"}, "question or problem or prompt"),
        ("instructions", {"prompt": "x", "instruction_id_list": ["no:such"], "kwargs": [{}]}, "instruction_ids"),
        ("preference", {}, "prompt"),
    ],
)
def test_a_row_without_its_fields_is_refused(task: str, row: dict[str, object], field: str) -> None:
    with pytest.raises(InputError) as caught:
        TASKS[task].prompt(row)
    assert str(caught.value.field).startswith(field)
