"""Problems for training and evaluating a policy: built in, JSONL files, Hugging Face datasets."""

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, cast

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lit_core.errors import InputError
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.progress import track
from lit_core.samplers import HomogeneousBatchSampler, ResumableBatchSampler
from lit_rl.data.countdown import CountdownConfig
from lit_rl.data.small_tasks import SmallTaskConfig
from lit_rl.data.sources import BUILT_IN, SOLUTION_FIELDS, Source
from lit_rl.problems import Problem, ProblemBatch, PromptConfig

logger = logging.getLogger(__name__)
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


class ProblemDataModule(LightningDataModule):
    """Base of what gives problems to a policy: loaders that leave out prompts too long for it.

    Args:
        where: Name of the data in errors.
        batch_size: Prompts that a device draws responses to at a time.
        eval_batch_size: The same in validation and test.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and hold-out.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(self, where: str, batch_size: int, eval_batch_size: int, num_workers: int, seed: int) -> None:
        super().__init__()
        numbers = {"batch_size": (batch_size, 1), "eval_batch_size": (eval_batch_size, 1),
                   "num_workers": (num_workers, 0)}  # fmt: skip
        for name, (value, least) in numbers.items():
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        self.where, self.batch_size, self.eval_batch_size = where, batch_size, eval_batch_size
        self.num_workers, self.seed = num_workers, seed
        self.splits: dict[str, list[Problem]] = {}

    def read(self) -> dict[str, list[Problem]]:
        """Problems of ``train``, ``val`` and ``test``; their ids differ."""
        raise NotImplementedError

    def training(
        self, problems: list[Problem], rank: int, world_size: int
    ) -> tuple[Dataset[Problem], ResumableBatchSampler]:
        """Problems of training by the keys of a sampler, and that sampler."""
        raise NotImplementedError

    def setup(self, stage: str) -> None:
        """Read the problems, once.

        Raises:
            InputError: A file is missing or broken, or there are too few problems.
        """
        self.splits = self.splits or self.read()

    def train_dataloader(self) -> ResumableLoader:
        module = cast(Any, self._module())
        collate = module.demonstration_collator() if hasattr(module, "demonstration_collator") else None
        if collate is not None and all(problem.solution is None for problem in self.splits["train"]):
            raise InputError(f"no row has a solution to imitate ({', '.join(SOLUTION_FIELDS)})", self.where)
        dataset, sampler = self.training(self._short_enough("train"), *self._ranks())
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
            raise InputError(f"every prompt has more than {most} tokens; raise --model.prompt.max_tokens", self.where)
        return kept

    def _ranks(self) -> tuple[int, int]:
        """This process's rank and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)


class PromptDataModule(ProblemDataModule):
    """Prompts with what their rewards depend on.

    Without files of their own, validation and test each take 5 % of the problems, at most 200.

    Args:
        path: ``countdown``, ``sums``, ``chat_words`` or ``constraints`` (built in), a ``.jsonl`` file, a folder with
            ``train.jsonl`` (and perhaps ``val.jsonl`` and ``test.jsonl``), or a Hugging Face dataset.
        task: Name of the task, which says what fields a row needs: ``countdown``, ``countdown_bare``,
            ``countdown_steps``, ``countdown_compatible`` (numbers, target), ``math`` (question or problem, answer or
            solution), ``instructions`` or ``instructions_share`` (prompt, instruction_id_list, kwargs), ``preference``
            (prompt), ``sums`` (numbers), ``chat_words`` (topics), ``constraints`` (instruction_id_list, kwargs).
        val_path: File with the problems of validation.
        test_path: File with the problems of the test.
        batch_size: Prompts that a device draws responses to at a time.
        eval_batch_size: The same in validation and test.
        countdown: The built-in Countdown problems; its ``count`` are those of training.
        small: The other built-in problems; the same of its ``count``.
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
        small: SmallTaskConfig = SmallTaskConfig(),  # noqa: B008
        held_out: int = 200,
        hf_config: str | None = None,
        hf_split: str = "train",
        limit: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(path, batch_size, eval_batch_size, num_workers, seed)
        for name, value in (("held_out", held_out), ("limit", 1 if limit is None else limit)):
            if value < 1:
                raise InputError(f"must be at least 1, got {value}", field=name)
        self.source = Source(
            path, task, val_path, test_path, countdown, small, held_out, hf_config, hf_split, limit, seed
        )

    def read(self) -> dict[str, list[Problem]]:
        return self.source.splits()

    def training(
        self, problems: list[Problem], rank: int, world_size: int
    ) -> tuple[Dataset[Problem], ResumableBatchSampler]:
        whole = len(problems) >= self.batch_size * world_size
        sampler = HomogeneousBatchSampler(
            [len(problems)], self.batch_size, self.seed, rank, world_size, drop_last=whole
        )
        return ProblemDataset(problems), sampler
