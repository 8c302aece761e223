"""Where problems come from: generators, JSONL files, folders, Hugging Face datasets."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lit_core.datasets import load_rows
from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track
from lit_core.samplers import permutation
from lit_rl.data.countdown import CountdownConfig, countdown_problems
from lit_rl.data.countdown_steps import written_steps
from lit_rl.data.small_tasks import GENERATORS, SmallTaskConfig, split_problems
from lit_rl.problems import Problem
from lit_rl.rewards.math import gold_answer
from lit_rl.rewards.tasks import TASKS

BUILT_IN = "countdown"
HELD_OUT = (0.05, 200)  # share and most of the problems that are held out where no file is named for them
SOLUTION_FIELDS = ("solution", "response", "completion", "answer")
SPLITS = ("train", "val", "test")
Splits = dict[str, list[Problem]]


@dataclass(frozen=True)
class Source:
    """Problems of one task.

    Args:
        path: ``countdown``, ``sums``, ``chat_words`` or ``constraints`` (built in), a ``.jsonl`` file, a folder with
            ``train.jsonl``, or a Hugging Face dataset.
        task: Name of the task.
        val_path: File with the problems of validation.
        test_path: File with the problems of the test.
        countdown: The built-in Countdown problems.
        small: The other built-in problems.
        held_out: Built-in problems for validation, and as many for the test.
        hf_config: Configuration of a Hugging Face dataset.
        hf_split: Its split.
        limit: Most problems of training.
        seed: Seed of the hold-out.

    Raises:
        InputError: An unknown task, or one that is not that of the built-in problems.
    """

    path: str
    task: str
    val_path: str | None
    test_path: str | None
    countdown: CountdownConfig
    small: SmallTaskConfig
    held_out: int
    hf_config: str | None
    hf_split: str
    limit: int | None
    seed: int

    def __post_init__(self) -> None:
        if self.task not in TASKS:
            raise InputError(f"must be one of {', '.join(TASKS)}, got '{self.task}'", field="task")
        if self.path in GENERATORS and self.task != self.path:
            raise InputError(f"the built-in problems {self.path} have a task of that name, not {self.task}",
                             field="task")  # fmt: skip

    @property
    def built_in(self) -> bool:
        """Whether the problems come from a generator."""
        return self.path == BUILT_IN or self.path in GENERATORS

    def splits(self) -> Splits:
        """Problems of ``train``, ``val`` and ``test``; their ids differ.

        Raises:
            InputError: A file is missing or broken, or there are too few problems.
        """
        found = self._built_in() if self.built_in else self._read()
        found["train"] = found["train"][: self.limit]
        for name, problems in found.items():
            if not problems:
                raise InputError(f"there are no problems for {name}", self.path)
        return found

    def problem(self, row: dict[str, Any], number: int, domain: str = "") -> Problem:
        """Problem of a row.

        Raises:
            InputError: The row lacks a field of the task.
        """
        prompt = TASKS[self.task].prompt(row)
        solution = next((row[name] for name in SOLUTION_FIELDS if isinstance(row.get(name), str)), None)
        if solution is not None and self.task == "math" and gold_answer(solution) == solution.strip():
            solution = None  # the bare answer is no example of how to reason
        if solution is not None and self.path == BUILT_IN:
            solution = self._spoken(solution, row["numbers"], number)
        return Problem(number, self.task, prompt, row, solution, domain)

    def _built_in(self) -> Splits:
        if self.path in GENERATORS:
            rows = split_problems(self.task, self.small, self.held_out)
        elif not self.task.startswith("countdown"):
            raise InputError(f"the built-in problems are Countdown, not {self.task}: name a file with --data.path"
                             f"{f', or --data.path {self.task}' if self.task in GENERATORS else ''}")  # fmt: skip
        else:
            config, held_out = self.countdown, self.held_out
            found = countdown_problems(replace(config, count=config.count + 2 * held_out))
            every = [{"numbers": list(p.numbers), "target": p.target, "solution": p.solution} for p in found]
            rows = {
                "test": every[:held_out],
                "val": every[held_out : 2 * held_out],
                "train": every[2 * held_out :],
            }
        splits, first = Splits(), 0
        for name, part in rows.items():
            splits[name] = [self.problem(row, number) for number, row in enumerate(part, start=first)]
            first += len(part)
        return splits

    def _read(self) -> Splits:
        splits, first = Splits(), 0
        for name, source in files_of(self.path, self.val_path, self.test_path).items():
            splits[name] = []
            for line, row in read_rows(source, self.hf_config, self.hf_split):
                try:
                    splits[name].append(self.problem(row, first + len(splits[name])))
                except InputError as error:
                    raise InputError(error.message, source, line=line, field=error.field) from None
            first += len(splits[name])
        return with_hold_outs(splits, self.seed, self.path)

    def _spoken(self, expression: str, numbers: list[int], problem: int) -> str:
        """A built-in solution of Countdown as a response."""
        if self.task == "countdown_bare":
            return expression.replace(" ", "")
        if self.task == "countdown_steps":
            return written_steps(expression, numbers, self.countdown.seed, problem)
        return f"<think>{expression}</think> <answer>{expression}</answer>"


def files_of(path: str, val_path: str | None, test_path: str | None) -> dict[str, str]:
    """Sources of the splits that have one; in a folder with ``train.jsonl``, those beside it too."""
    paths = {"train": path, "val": val_path, "test": test_path}
    folder = Path(path)
    if folder.is_dir() and (folder / "train.jsonl").is_file():
        beside = {name: folder / f"{name}.jsonl" for name in SPLITS}
        paths = {name: paths[name] if name != "train" and paths[name] else str(file) if file.is_file() else None
                 for name, file in beside.items()}  # fmt: skip
    return {name: source for name, source in paths.items() if source is not None}


def read_rows(source: str, hf_config: str | None, hf_split: str) -> Iterable[tuple[int, dict[str, Any]]]:
    """Rows of a JSONL file or a Hugging Face dataset, with their numbers from 1."""
    path = Path(source)
    rows: Iterable[tuple[int, dict[str, Any]]]
    rows = read_jsonl(path) if path.suffix == ".jsonl" else enumerate(load_rows(source, hf_config, hf_split), start=1)
    return track(rows, f"reading {path.name}", unit="row")


def with_hold_outs(splits: Splits, seed: int, where: str) -> Splits:
    """Splits in which problems of training are held out for the evaluations that have none of their own.

    Raises:
        InputError: There are too few.
    """
    for name in ("test", "val"):
        if name in splits:
            continue
        problems = splits["train"]
        if len(problems) < 2:
            raise InputError(f"needs at least two problems, to hold one out for {name}; got {len(problems)}", where)
        share, most = HELD_OUT
        count = min(most, max(1, int(share * len(problems))))
        taken = set(permutation(len(problems), seed, 11 if name == "val" else 12)[:count])
        splits[name] = [problems[n] for n in sorted(taken)]
        splits["train"] = [p for n, p in enumerate(problems) if n not in taken]
    return splits
