import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_rl.data.countdown import CountdownConfig
from lit_rl.data.prompts import PromptDataModule
from lit_rl.problems import DemonstrationCollator, PromptCollator, PromptConfig

SMALL = CountdownConfig(count=40, least_numbers=2, most_numbers=3, largest_number=9, largest_target=50)
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}>{% endif %}"
)


def module(prompt: PromptConfig = PromptConfig(), demonstrations: bool = False) -> Any:  # noqa: B008
    tokenizer = preset_tokenizer("nano-qwen3")
    found = SimpleNamespace(prompt=prompt, prompt_collator=lambda: PromptCollator(tokenizer, prompt))
    if demonstrations:
        found.demonstration_collator = lambda: DemonstrationCollator(tokenizer, prompt)
    return found


def attached(data: PromptDataModule, method: Any) -> PromptDataModule:
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=method)  # type: ignore[assignment]
    data.setup("fit")
    return data


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_built_in_problems_are_apart_and_have_solutions() -> None:
    data = attached(PromptDataModule(task="countdown_bare", countdown=SMALL, held_out=8, batch_size=5), module())
    splits = {
        name: {(tuple(sorted(p.row["numbers"])), p.row["target"]) for p in found} for name, found in data.splits.items()
    }
    assert {name: len(found) for name, found in splits.items()} == {"train": 40, "val": 8, "test": 8}
    assert not splits["train"] & (splits["val"] | splits["test"])
    assert len({problem.id for found in data.splits.values() for problem in found}) == 56
    batch = next(iter(data.train_dataloader()))
    assert len(batch) == 5
    assert batch.prompts[0] == preset_tokenizer("nano-qwen3")(batch.problems[0].prompt)["input_ids"]
    assert sum(len(batch) for batch in data.val_dataloader()) == 8


def test_demonstrations_end_with_the_end_token() -> None:
    data = attached(PromptDataModule(task="countdown_bare", countdown=SMALL, held_out=4), module(demonstrations=True))
    batch = next(iter(data.train_dataloader()))
    tokenizer = preset_tokenizer("nano-qwen3")
    assert all(row[-1] == tokenizer.eos_token_id for row in batch.solutions)
    assert tokenizer.decode(batch.solutions[0][:-1]) == batch.problems[0].solution


def test_the_order_is_a_function_of_the_seed() -> None:
    def first(seed: int) -> list[int]:
        data = attached(PromptDataModule(task="countdown_bare", countdown=SMALL, held_out=4, seed=seed), module())
        return [problem.id for batch in data.train_dataloader() for problem in batch.problems]

    assert first(0) == first(0)
    assert first(0) != first(1)
    assert sorted(first(0)) == sorted(first(1))


def test_files_hold_problems_out_unless_files_of_their_own_are_named(tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + {n}?", "answer": f"{n} + {n}\n#### {2 * n}"} for n in range(40)]
    path = write(tmp_path / "train.jsonl", rows)
    data = attached(PromptDataModule(path, "math"), module())
    assert {name: len(found) for name, found in data.splits.items()} == {"train": 37, "val": 1, "test": 2}
    assert data.splits["train"][0].solution is not None
    write(tmp_path / "test.jsonl", rows[:5])
    data = attached(PromptDataModule(str(tmp_path), "math", val_path=str(tmp_path / "test.jsonl")), module())
    assert {name: len(found) for name, found in data.splits.items()} == {"train": 40, "val": 5, "test": 5}


def test_chat_template_and_system_turn() -> None:
    tokenizer = preset_tokenizer("tiny-qwen3")
    plain = PromptCollator(tokenizer, PromptConfig(system="Be brief."))
    assert tokenizer.decode(plain.ids(["hi"])[0]) == "Be brief.\nhi"
    with pytest.raises(InputError, match="no chat template"):
        PromptCollator(tokenizer, PromptConfig(chat_template=True))
    tokenizer.chat_template = TEMPLATE
    templated = PromptCollator(tokenizer, PromptConfig(system="Be brief."))
    assert tokenizer.decode(templated.ids(["hi"])[0]) == "[system]Be brief.[user]hi>"
    never = PromptCollator(tokenizer, PromptConfig(chat_template=False))
    assert tokenizer.decode(never.ids(["hi"])[0]) == "hi"


def test_long_prompts_are_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path / "p.jsonl", [{"prompt": "word " * n} for n in range(1, 41)])
    data = attached(PromptDataModule(path, "preference"), module(PromptConfig(max_tokens=20)))
    kept = {problem.id for batch in data.train_dataloader() for problem in batch.problems}
    assert 0 < len(kept) < 37
    assert "have more than 20 tokens and are left out (train)" in caplog.text
    data = attached(PromptDataModule(path, "preference"), module(PromptConfig(max_tokens=1)))
    with pytest.raises(InputError, match="every prompt has more than 1 tokens"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ('{"question": "a", "answer": "1"}\n{"answer": "2"}\n', "p.jsonl:2: field 'question or problem or prompt'"),
        ('{"question": "a", "answer": "1"}\n{broken\n', "p.jsonl:2"),
        ('{"question": "", "answer": "1"}\n', "p.jsonl:1"),
        ("", "p.jsonl"),
    ],
)
def test_broken_files(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "p.jsonl").write_text(content)
    with pytest.raises(InputError) as caught:
        attached(PromptDataModule(str(tmp_path / "p.jsonl"), "math"), module())
    assert told in str(caught.value)


def test_mistakes_in_arguments() -> None:
    with pytest.raises(InputError, match="field 'task'"):
        PromptDataModule(task="nonsense")
    with pytest.raises(InputError, match="field 'batch_size'"):
        PromptDataModule(batch_size=0)
    with pytest.raises(InputError, match="the built-in problems are Countdown"):
        attached(PromptDataModule(task="math"), module())


def test_imitation_needs_solutions(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [{"question": f"{n} + 1?", "answer": str(n + 1)} for n in range(10)])
    data = attached(PromptDataModule(path, "math"), module(demonstrations=True))
    with pytest.raises(InputError, match="no row has a solution to imitate"):
        data.train_dataloader()
