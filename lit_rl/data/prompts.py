"""Problems for training and evaluating a policy: built-in Countdown, JSONL files, Hugging Face datasets."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_core.datasets import load_rows
from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.progress import track
from lit_core.samplers import HomogeneousBatchSampler, permutation
from lit_rl.data.countdown import CountdownConfig, countdown_problems
from lit_rl.data.countdown_steps import written_steps
from lit_rl.problems import Problem, ProblemBatch, PromptConfig
from lit_rl.rewards.math import gold_answer
from lit_rl.rewards.tasks import TASKS

logger = logging.getLogger(__name__)
BUILT_IN = "countdown"
HELD_OUT = (0.05, 200)  # share and most of the problems that are held out where no file is named for them
SOLUTION_FIELDS = ("solution", "response", "completion", "answer")
MEASURED = 1000  # prompts tokenised at once


class Collating(Protocol):
    """What the data module needs of the LightningModule."""

    prompt: PromptConfig

    def prompt_collator(self) -> Callable[[list[Problem]], ProblemBatch]:
        """Return a function that makes a batch of problems."""
        ...


class ProblemDataset(Dataset[Problem]):
    """Problems addressed by the keys of the batch samplers."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = problems

    def __len__(self) -> int:
        return len(self.problems)

    def __getitem__(self, key: tuple[int, int, int]) -> Problem:
        return self.problems[key[1]]


class EvaluationSampler(Sampler[list[tuple[int, int, int]]]):
    """Batches of all rows in order, dealt to the ranks; the last rows are repeated where they do not come out even.

    Args:
        size: Rows.
        batch_size: Rows of a batch.
        rank: This process's rank.
        world_size: Number of ranks.
    """

    def __init__(self, size: int, batch_size: int, rank: int, world_size: int) -> None:
        rows = list(range(size)) + [size - 1] * (-size % world_size)
        own = [(0, row, 0) for row in rows[rank::world_size]]
        self.batches = [own[start : start + batch_size] for start in range(0, len(own), batch_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        return iter(self.batches)


class PromptDataModule(LightningDataModule):
    """Prompts with what their rewards depend on.

    Without files of their own, validation and test each take 5 % of the problems, at most 200.

    Args:
        path: ``countdown`` (the built-in problems), a ``.jsonl`` file, a folder with ``train.jsonl`` (and perhaps
            ``val.jsonl`` and ``test.jsonl``), or a Hugging Face dataset.
        task: Name of the task, which says what fields a row needs: ``countdown``, ``countdown_bare``,
            ``countdown_steps``, ``countdown_compatible`` (numbers, target), ``math`` (question or problem, answer or
            solution), ``instructions`` (prompt, instruction_id_list, kwargs), ``preference`` (prompt).
        val_path: File with the problems of validation.
        test_path: File with the problems of the test.
        batch_size: Prompts that a device draws responses to at a time.
        eval_batch_size: The same in validation and test.
        countdown: The built-in problems; its ``count`` are those of training.
        held_out: Built-in problems for validation, and as many for the test.
        hf_config: Configuration of a Hugging Face dataset.
        hf_split: Its split.
        limit: Train on this many problems at most, for trials.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and hold-out.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        path: str = BUILT_IN,
        task: str = "countdown",
        val_path: str | None = None,
        test_path: str | None = None,
        batch_size: int = 64,
        eval_batch_size: int = 128,
        countdown: CountdownConfig = CountdownConfig(),  # noqa: B008  read only
        held_out: int = 200,
        hf_config: str | None = None,
        hf_split: str = "train",
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("held_out", held_out, 1),
            ("num_workers", num_workers, 0),
            ("limit", 1 if limit is None else limit, 1),
        ):
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        if task not in TASKS:
            raise InputError(f"must be one of {', '.join(TASKS)}, got '{task}'", field="task")
        self.path, self.task, self.val_path, self.test_path = path, task, val_path, test_path
        self.batch_size, self.eval_batch_size, self.countdown = batch_size, eval_batch_size, countdown
        self.held_out, self.hf_config, self.hf_split = held_out, hf_config, hf_split
        self.limit, self.num_workers, self.seed = limit, num_workers, seed
        self.splits: dict[str, list[Problem]] = {}

    def setup(self, stage: str) -> None:
        """Read the problems, once.

        Raises:
            InputError: A file is missing or broken, or there are too few problems.
        """
        if self.splits:
            return
        self.splits = self._built_in() if self.path == BUILT_IN else self._read()
        self.splits["train"] = self.splits["train"][: self.limit]
        for name, problems in self.splits.items():
            if not problems:
                raise InputError(f"there are no problems for {name}", self.path)

    def train_dataloader(self) -> ResumableLoader:
        module = cast(Any, self._module())
        collate = module.demonstration_collator() if hasattr(module, "demonstration_collator") else None
        if collate is not None and all(problem.solution is None for problem in self.splits["train"]):
            raise InputError(f"no row has a solution to imitate ({', '.join(SOLUTION_FIELDS)})", self.path)
        dataset = ProblemDataset(self._short_enough("train"))
        rank, ranks = self._ranks()
        whole = len(dataset) >= self.batch_size * ranks
        sampler = HomogeneousBatchSampler([len(dataset)], self.batch_size, self.seed, rank, ranks, drop_last=whole)
        return ResumableLoader(dataset, sampler, collate or module.prompt_collator(), self.num_workers)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._evaluation_loader("test")

    def _evaluation_loader(self, split: str) -> DataLoader[Any]:
        dataset = ProblemDataset(self._short_enough(split))
        sampler = EvaluationSampler(len(dataset), self.eval_batch_size, *self._ranks())
        return plain_loader(dataset, sampler, self._module().prompt_collator(), self.num_workers)

    def _module(self) -> Collating:
        if self.trainer is None:
            raise ValueError("loaders need a trainer: its module tokenises the prompts")
        return cast(Collating, self.trainer.lightning_module)

    def _short_enough(self, split: str) -> list[Problem]:
        """Problems whose prompts the policy is to read; the others are left out, which is said."""
        module = self._module()
        collate, most = cast(Any, module.prompt_collator()), module.prompt.max_tokens
        problems = self.splits[split]
        kept = []
        for start in track(range(0, len(problems), MEASURED), "measuring prompts", unit=f"{MEASURED} prompts"):
            part = problems[start : start + MEASURED]
            ids = collate.ids([problem.prompt for problem in part])
            kept += [problem for problem, tokens in zip(part, ids, strict=True) if len(tokens) <= most]
        if len(kept) < len(problems):
            logger.warning("%d of %d prompts have more than %d tokens and are left out (%s)",
                           len(problems) - len(kept), len(problems), most, split)  # fmt: skip
        if not kept:
            raise InputError(f"every prompt has more than {most} tokens; raise --model.prompt.max_tokens", self.path)
        return kept

    def _ranks(self) -> tuple[int, int]:
        """This process's rank and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _built_in(self) -> dict[str, list[Problem]]:
        if not self.task.startswith("countdown"):
            raise InputError(f"the built-in problems are Countdown, not {self.task}: name a file with --data.path")
        config, held_out = self.countdown, self.held_out
        found = countdown_problems(replace(config, count=config.count + 2 * held_out))
        rows = [{"numbers": list(p.numbers), "target": p.target, "solution": p.solution} for p in found]
        problems = [self._problem(row, number) for number, row in enumerate(rows)]
        return {
            "test": problems[:held_out],
            "val": problems[held_out : 2 * held_out],
            "train": problems[2 * held_out :],
        }

    def _read(self) -> dict[str, list[Problem]]:
        path = Path(self.path)
        paths = {"train": self.path, "val": self.val_path, "test": self.test_path}
        if path.is_dir() and (path / "train.jsonl").is_file():
            beside = {name: path / f"{name}.jsonl" for name in ("train", "val", "test")}
            paths = {name: paths[name] if name != "train" and paths[name] else str(file) if file.is_file() else None
                     for name, file in beside.items()}  # fmt: skip
        splits = {}
        first = 0
        for name, source in paths.items():
            if source is not None:
                splits[name] = self._problems(source, first)
                first += len(splits[name])
        for name in ("test", "val"):
            if name not in splits:
                splits[name], splits["train"] = self._hold_out(splits["train"], name)
        return splits

    def _hold_out(self, problems: list[Problem], name: str) -> tuple[list[Problem], list[Problem]]:
        if len(problems) < 2:
            raise InputError(f"needs at least two problems, to hold one out for {name}; got {len(problems)}", self.path)
        share, most = HELD_OUT
        count = min(most, max(1, int(share * len(problems))))
        order = permutation(len(problems), self.seed, 11 if name == "val" else 12)
        taken = set(order[:count])
        return [problems[n] for n in sorted(taken)], [p for n, p in enumerate(problems) if n not in taken]

    def _problems(self, source: str, first: int) -> list[Problem]:
        path = Path(source)
        rows: Iterable[tuple[int, dict[str, Any]]]
        if path.suffix == ".jsonl":
            rows = read_jsonl(path)
        else:
            rows = enumerate(load_rows(source, self.hf_config, self.hf_split), start=1)
        found: list[Problem] = []
        for line, row in track(rows, f"reading {path.name}", unit="row"):
            try:
                found.append(self._problem(row, first + len(found)))
            except InputError as error:
                raise InputError(error.message, source, line=line, field=error.field) from None
        return found

    def _problem(self, row: dict[str, Any], number: int) -> Problem:
        prompt = TASKS[self.task].prompt(row)
        solution = next((row[name] for name in SOLUTION_FIELDS if isinstance(row.get(name), str)), None)
        if solution is not None and self.task == "math" and gold_answer(solution) == solution.strip():
            solution = None  # the bare answer is no example of how to reason
        if solution is not None and self.path == BUILT_IN:
            solution = self._spoken(solution, row["numbers"], number)
        return Problem(number, self.task, prompt, row, solution)

    def _spoken(self, expression: str, numbers: list[int], problem: int) -> str:
        """A built-in solution as a response."""
        if self.task == "countdown_bare":
            return expression.replace(" ", "")
        if self.task == "countdown_steps":
            return written_steps(expression, numbers, self.countdown.seed, problem)
        return f"<think>{expression}</think> <answer>{expression}</answer>"
