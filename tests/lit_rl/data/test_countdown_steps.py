import re

from lit_core.presets import preset_tokenizer
from lit_rl.data.countdown import CountdownConfig, countdown_problems
from lit_rl.data.countdown_steps import written_steps
from lit_rl.data.prompts import PromptDataModule
from lit_rl.rewards.countdown_steps import CONNECTORS, steps_reward

TINY = CountdownConfig(
    count=400, least_numbers=3, most_numbers=3, largest_number=15, largest_target=99, operators="+-*"
)
SUM, NUMBERS = "(1 + 2) + (3 * (10 - 4))", (1, 2, 3, 10, 4)


def steps_of(solution: str) -> tuple[str, ...]:
    return tuple(re.findall(r"\d+[-+*/]\d+=\d+", solution))


def test_a_solution_worked_out_by_hand() -> None:  # two numbers and "-" leave one way, up to words and notes
    found = {written_steps("9 - 4", (4, 9), 0, problem) for problem in range(400)}
    assert {re.sub("[a-z]+", "w", text) for text in found if "w w" not in re.sub("[a-z]+", "w", text)} == {
        "w 9-4=5", "w(4,9) w 9-4=5", "w 9-4=5 w(5)", "w(4,9) w 9-4=5 w(5)",
    }  # fmt: skip
    assert {re.split(r"[ (]", text)[0] for text in found} == set(CONNECTORS)


def test_draws_depend_on_seed_and_problem() -> None:
    first = [written_steps(SUM, NUMBERS, 0, problem) for problem in range(20)]
    assert first == [written_steps(SUM, NUMBERS, 0, problem) for problem in range(20)]
    assert first != [written_steps(SUM, NUMBERS, 1, problem) for problem in range(20)]
    assert len(set(first)) == 20


def test_steps_come_in_every_equivalent_order_without_negative_results() -> None:
    found = {steps_of(written_steps(SUM, NUMBERS, 0, problem)) for problem in range(2000)}
    assert {steps[0].split("=")[0] for steps in found} == {"1+2", "2+1", "10-4"}
    assert {("10-4=6", "6*3=18", "2+18=20", "20+1=21"), ("2+1=3", "10-4=6", "3*6=18", "18+3=21")} <= found
    for turned in ("(4 - 9) * (2 - 7)", "30 - ((2 - 5) * 3)", "(10 - 12) / 2 + 5", "12 / (6 / (3 - 9)) + 20"):
        numbers = tuple(map(int, re.findall(r"\d+", turned)))
        target = int(eval(turned))
        for problem in range(20):
            text = written_steps(turned, numbers, 0, problem)
            assert "=-" not in text
            assert steps_reward(text, numbers, target) == 1


def test_lengths_of_solutions_vary_twofold_and_fit() -> None:
    tokenizer = preset_tokenizer("nano-qwen3")
    problems = countdown_problems(TINY)
    texts = [written_steps(p.solution, p.numbers, 0, row) for row, p in enumerate(problems)]
    lengths = sorted(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts)
    assert lengths[-1] <= 64
    assert lengths[len(lengths) * 9 // 10] > 2 * lengths[len(lengths) // 10]
    words = re.findall("[a-z]+", " ".join(texts))
    assert all(abs(words.count(word) / len(words) - 1 / len(CONNECTORS)) < 0.04 for word in CONNECTORS)


def test_the_data_module_writes_them() -> None:
    data = PromptDataModule(task="countdown_steps", countdown=TINY, held_out=50)
    data.setup("fit")
    bare = PromptDataModule(task="countdown_bare", countdown=TINY, held_out=50)
    bare.setup("fit")
    for problem, other in zip(data.splits["train"], bare.splits["train"], strict=True):
        assert (problem.prompt, problem.row) == (other.prompt, other.row)
        assert steps_reward(str(problem.solution), problem.row["numbers"], problem.row["target"]) == 1
