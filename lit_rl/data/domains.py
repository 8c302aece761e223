"""Problems of several domains, of which every batch has its share."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch.utils.data import Dataset

from lit_core.errors import InputError
from lit_core.quotas import QuotaBatchSampler, Quotas
from lit_core.samplers import ResumableBatchSampler
from lit_rl.data.countdown import CountdownConfig
from lit_rl.data.prompts import ProblemDataModule
from lit_rl.data.small_tasks import GENERATORS, SmallTaskConfig
from lit_rl.data.sources import BUILT_IN, SPLITS, Source, Splits, files_of, read_rows, with_hold_outs
from lit_rl.problems import DOMAIN_SUMMARIES, Problem

LABEL_FIELDS = ("domain", "ability")  # of a row in a file with several domains; the first that it has counts


@dataclass(frozen=True)
class DomainConfig:
    """One of several domains.

    Args:
        task: Name of the task of its rows, see ``PromptDataModule``.
        path: Its problems: a built-in task, a file, a folder, or a Hugging Face dataset. None takes the task's own
            built-in problems, or, where the data module has a ``path``, the rows there that carry the domain's name.
        share: Its share of each batch, above 0; only the ratios between domains matter.
        val_path: File with its problems of validation.
        test_path: File with its problems of the test.
        small: Its built-in problems.
        countdown: The same of Countdown.
        held_out: Built-in problems for validation, and as many for the test.
        hf_config: Configuration of a Hugging Face dataset.
        hf_split: Its split.
        limit: Train on this many of its problems at most.

    Raises:
        InputError: A number is out of range.
    """

    task: str
    path: str | None = None
    share: float = 1.0
    val_path: str | None = None
    test_path: str | None = None
    small: SmallTaskConfig = field(default_factory=SmallTaskConfig)
    countdown: CountdownConfig = field(default_factory=CountdownConfig)
    held_out: int = 200
    hf_config: str | None = None
    hf_split: str = "train"
    limit: int | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share < float("inf"):
            raise InputError(f"must be above 0, got {self.share}", field="share")
        for name, value in (("held_out", self.held_out), ("limit", 1 if self.limit is None else self.limit)):
            if value < 1:
                raise InputError(f"must be at least 1, got {value}", field=name)


class DomainDataset(Dataset[Problem]):
    """Problems of several domains, addressed by the keys of a ``QuotaBatchSampler``.

    Args:
        domains: Problems of each domain, by name.
    """

    def __init__(self, domains: Mapping[str, list[Problem]]) -> None:
        self.domains = list(domains.values())

    def __len__(self) -> int:
        return sum(map(len, self.domains))

    def __getitem__(self, key: tuple[int, int, int]) -> Problem:
        return self.domains[key[0]][key[1]]


class DomainDataModule(ProblemDataModule):
    """Prompts of several domains, each with its own task, and its share of every batch.

    Without files of their own, validation and test each take 5 % of a domain's problems, at most 200. The three domains
    of MGS (arXiv 2602.02301) at its scale:

    .. code-block:: yaml

        data:
          batch_size: 64 # prompts of a step, all devices together: 64 / devices
          domains:
            math: {task: math, path: data/simplerl_zoo_level3to5.jsonl} # question, answer; math-verify, 1 or 0
            chat: {task: preference, path: data/wildchat_if.jsonl} # prompt; scored by --model.reward_model
            if: {task: instructions_share, path: data/if_hard.jsonl} # prompt, instruction_id_list, kwargs

    Args:
        domains: Task, problems and share of each domain, by name.
        path: A file or Hugging Face dataset with rows of several domains, each with the name of its own in the field
            ``domain`` or ``ability``; for the domains without a ``path``.
        val_path: The same for validation.
        test_path: The same for the test.
        quotas: ``fixed`` gives each domain its share of every batch, all devices together, to the nearest prompt;
            ``random`` draws the domain of each prompt by the shares, as the authors of MGS do.
        synchronous: Give every device equally many prompts of each domain, in the same order; for sharded weights.
        train_on: Names of the domains to train on; empty is all. Evaluation has every domain.
        batch_size: Prompts that a device draws responses to at a time.
        eval_batch_size: The same in validation and test.
        hf_config: Configuration of a Hugging Face dataset at ``path``.
        hf_split: Its split.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and hold-out.

    Raises:
        InputError: An argument is out of range, or a domain has no problems.
    """

    def __init__(
        self,
        domains: dict[str, DomainConfig],
        path: str | None = None,
        val_path: str | None = None,
        test_path: str | None = None,
        quotas: Quotas = "fixed",
        synchronous: bool = False,
        train_on: Sequence[str] = (),
        batch_size: int = 64,
        eval_batch_size: int = 128,
        hf_config: str | None = None,
        hf_split: str = "train",
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(path or ", ".join(domains), batch_size, eval_batch_size, num_workers, seed)
        if not domains:
            raise InputError("need at least one domain", field="domains")
        for name in domains:
            if not re.fullmatch(r"[\w-]+", name) or name in DOMAIN_SUMMARIES:
                raise InputError(f"a domain's name is letters, digits, - and _, but not {' or '.join(DOMAIN_SUMMARIES)}"
                                 f"; got '{name}'", field="domains")  # fmt: skip
        self.domains, self.path, self.val_path, self.test_path = domains, path, val_path, test_path
        self.hf_config, self.hf_split = hf_config, hf_split
        self.quotas, self.synchronous = quotas, synchronous
        unknown = [name for name in train_on if name not in domains]
        if unknown:
            raise InputError(f"must be some of {', '.join(domains)}, got '{unknown[0]}'", field="train_on")
        self.train_on = [name for name in domains if name in train_on or not train_on]
        self._check_paths()
        self.sources = {name: self._source(name, domain) for name, domain in domains.items()}

    def read(self) -> Splits:
        shared = {name: source for name, source in self.sources.items() if self._in_shared_file(name)}
        found = self._read_shared(shared) if shared else {}
        for name, source in self.sources.items():
            if name not in shared:
                found[name] = source.splits()
        splits, first = Splits(), 0
        for split in SPLITS:
            every = [problem for name in self.domains for problem in _spread(name, found[name][split])]
            every.sort(key=lambda item: item[0])  # domains take turns, so that any part of an evaluation has them all
            splits[split] = [replace(problem, id=first + at) for at, (_, problem) in enumerate(every)]
            first += len(every)
        return splits

    def training(
        self, problems: list[Problem], rank: int, world_size: int
    ) -> tuple[Dataset[Problem], ResumableBatchSampler]:
        rows = {name: [problem for problem in problems if problem.domain == name] for name in self.train_on}
        sizes = {name: len(found) for name, found in rows.items()}
        shares = {name: self.domains[name].share for name in self.train_on}
        sampler = QuotaBatchSampler(
            sizes, shares, self.batch_size, self.seed, rank, world_size, self.quotas, self.synchronous
        )
        return DomainDataset(rows), sampler

    def _in_shared_file(self, name: str) -> bool:
        return self.path is not None and self.domains[name].path is None

    def _check_paths(self) -> None:
        if self.path is None and (self.val_path or self.test_path or self.hf_config):
            raise InputError("val_path, test_path and hf_config need a path of several domains", field="path")
        if self.path is not None and not any(map(self._in_shared_file, self.domains)):
            raise InputError("every domain has a path of its own, so none reads this one", self.path)
        for name, domain in self.domains.items():
            if domain.path is None and (domain.val_path or domain.test_path or domain.hf_config):
                raise InputError("val_path, test_path and hf_config need a path beside them", field=f"{name}.path")

    def _source(self, name: str, domain: DomainConfig) -> Source:
        path = domain.path or self.path
        if path is None and domain.task in GENERATORS:
            path = domain.task
        if path is None and domain.task.startswith("countdown"):
            path = BUILT_IN
        try:
            source = Source(
                path or "", domain.task, domain.val_path, domain.test_path, domain.countdown, domain.small,
                domain.held_out, domain.hf_config, domain.hf_split, domain.limit, self.seed,
            )  # fmt: skip
        except InputError as error:
            raise InputError(error.message, field=f"{name}.{error.field}") from None
        if path is None:
            raise InputError(f"the task {domain.task} has no built-in problems: name a file", field=f"{name}.path")
        return source

    def _read_shared(self, sources: Mapping[str, Source]) -> dict[str, Splits]:
        assert self.path is not None  # there are no shared rows otherwise
        found: dict[str, Splits] = {name: {} for name in sources}
        for split, file in files_of(self.path, self.val_path, self.test_path).items():
            for name in sources:
                found[name][split] = []
            for line, row in read_rows(file, self.hf_config, self.hf_split):
                try:
                    name = _label(row, list(sources))
                    found[name][split].append(sources[name].problem(row, line))
                except InputError as error:
                    raise InputError(error.message, file, line=line, field=error.field) from None
            for name in sources:
                if not found[name][split]:
                    raise InputError(f"no row is of the domain '{name}'", file)
        for name, splits in found.items():
            with_hold_outs(splits, self.seed, f"{self.path}, domain '{name}'")
            splits["train"] = splits["train"][: sources[name].limit]
        return found


def _label(row: Mapping[str, Any], names: list[str]) -> str:
    """Domain of a row.

    Raises:
        InputError: It has none, or another.
    """
    given = next((row[name] for name in LABEL_FIELDS if row.get(name) is not None), None)
    if given is None:
        raise InputError("is missing", field=" or ".join(LABEL_FIELDS))
    if given not in names:
        raise InputError(f"must be one of {', '.join(names)}, got '{given}'", field="domain")
    return given


def _spread(name: str, problems: list[Problem]) -> list[tuple[float, Problem]]:
    """Problems with the name of their domain, and with places that are evenly spread over ``(0, 1)``."""
    return [((at + 0.5) / len(problems), replace(problem, domain=name)) for at, problem in enumerate(problems)]
