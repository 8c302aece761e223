"""The data of BOOM: several training sets of different task types, bags of them, and tasks to evaluate on."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from typing import Any, Literal, NamedTuple, get_args

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_core.errors import InputError
from lit_core.loader import ResumableLoader
from lit_core.schedules import DataSchedule, schedule_sampler
from lit_embed.data.bagging import CORE_RATIO, Bag, Rows, check_manifest, core_rows, late_rows, manifest
from lit_embed.data.dataset import MixedDataset, PairDataset
from lit_embed.data.encoding import EncodingDataModule, whole_prediction
from lit_embed.data.families import FamiliesConfig
from lit_embed.data.negatives import add_bm25_negatives
from lit_embed.data.records import Example
from lit_embed.data.sources import PairKind, Stage
from lit_embed.data.task_sources import (
    FamiliesSource,
    TaskSet,
    TaskSource,
    apart,
    instruct,
    sources_of,
    task_of,
    with_instruction,
)
from lit_embed.retrieval.tasks import EvalTask, TaskType

Part = Literal["all", "old", "new", "core", "core+new"]

DEFAULT_BAG = Bag()
DEFAULT_FAMILIES = FamiliesConfig()


class EncodedTask(NamedTuple):
    """An evaluation task, and under which key each of its texts is encoded."""

    task: EvalTask
    queries: dict[str, str]
    passages: dict[str, str]


class TaskDataModule(EncodingDataModule):
    """Training sets of several task types, in a schedule, as a whole or as a member's bag; and evaluation tasks.

    Validation, testing and prediction give two loaders, ``[queries, passages]``, or ``[queries]`` where no task has
    passages: each distinct text of all tasks once. ``evaluation`` lists the tasks and which vectors are theirs. A text
    may come twice where devices do not share out evenly: drop duplicates by id. The trainer needs
    ``use_distributed_sampler=False``: the samplers shard by rank themselves.

    Args:
        path: ``families`` (built in), BEIR folders, JSONL files of pairs, or folders of such files; each folder or
            file is a set. FlagEmbedding's ``prompt``, ``type``, ``batch_size``, ``pos_scores``, ``neg_scores`` and
            names that end with ``no_in_batch_neg`` mean what they mean there.
        schedule: ``bls`` mixes batches, each of one set; ``dataset`` takes set after set, ``task`` type after type;
            ``mixed`` mixes rows, in batches of one size that make about as many steps.
        order: Sets or task types in the order of training; by default by decreasing size.
        types: Train on sets of these task types alone, as a stage of several does.
        train_on: Train on these sets alone.
        leave_out: Do not train on these sets.
        held_out: Evaluate on these folders or files alone; they count as out of domain.
        batch_size: Queries a device gets per step; half as many in a symmetric set.
        negatives: Hard negatives per query.
        hard_negatives: ``bm25`` finds negatives for examples without any.
        bag: The part of each set that a member is trained on.
        part: Of a corpus that grows: ``old`` rows, ``new`` ones, the ``core`` of the old, or the ``core+new``.
        new: What arrives later: names of sets, or the share of each set's rows.
        core: Percent of the old rows in the core.
        instructions: Put ``Instruct: <task>`` before queries, and before both sides in symmetric sets.
        task_instructions: Instruction by name of folder or file, where its rows have none.
        families: The built-in sets and tasks.
        base: Train on the built-in sets for a base.
        pairs: What to train on in a BEIR folder; see ``RetrievalDataModule``.
        val_split: Split of a BEIR folder to validate on; without ``dev``, pairs are held out from training.
        test_split: Split of a BEIR folder to test on.
        limit: Train on this many rows of each set at most, for trials.
        token_budget: Padded tokens of a batch in encoding, estimated as four bytes each.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and draws.
        split_seed: Seed of what is held out and of what arrives later; the same for all seeds.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        path: str | list[str] = "families",
        schedule: DataSchedule = "bls",
        order: list[str] | None = None,
        types: list[TaskType] | None = None,
        train_on: list[str] | None = None,
        leave_out: list[str] | None = None,
        held_out: list[str] | None = None,
        batch_size: int = 32,
        negatives: int = 7,
        hard_negatives: Literal["none", "bm25"] = "none",
        bag: Bag = DEFAULT_BAG,
        part: Part = "all",
        new: float | list[str] | None = None,
        core: float = CORE_RATIO,
        instructions: bool = True,
        task_instructions: dict[str, str] | None = None,
        families: FamiliesConfig = DEFAULT_FAMILIES,
        base: bool = False,
        pairs: PairKind = "auto",
        val_split: str = "dev",
        test_split: str = "test",
        limit: int | None = None,
        token_budget: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__(token_budget, num_workers)
        for name, value, least in (
            ("batch_size", batch_size, 1), ("negatives", negatives, 0), ("token_budget", token_budget, 1),
            ("num_workers", num_workers, 0), ("limit", 1 if limit is None else limit, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        if part not in get_args(Part):
            raise InputError(f"must be one of {', '.join(get_args(Part))}, got '{part}'", field="part")
        if part != "all" and not new:
            raise InputError(f"part '{part}' needs to know what arrives later: names of sets, or a share", field="new")
        if isinstance(new, float) and not 0 < new < 1:
            raise InputError(f"a share must lie between 0 and 1, got {new}", field="new")
        if not 0 < core <= 100:
            raise InputError(f"must be a percentage above 0, at most 100, got {core}", field="core")
        self.paths = [path] if isinstance(path, str) else list(path)
        if not self.paths:
            raise InputError("needs at least one path", field="path")
        if base and "families" not in self.paths:
            raise InputError("is for path 'families'", field="base")
        self.schedule, self.order, self.types, self.train_on = schedule, order, types, train_on
        self.leave_out = leave_out or []
        self.held_out, self.batch_size, self.negatives = held_out or [], batch_size, negatives
        self.hard_negatives, self.bag, self.part, self.new, self.core = hard_negatives, bag, part, new, core
        self.instructions, self.task_instructions = instructions, task_instructions or {}
        self.families, self.base, self.limit = families, base, limit
        self.beir = {"pairs": pairs, "val_split": val_split, "test_split": test_split}
        self.seed, self.split_seed = seed, split_seed
        self.manifest: dict[str, Any] = {}
        self._sources: list[TaskSource] = []
        self._sets: list[TaskSet] = []
        self._datasets: list[PairDataset] = []
        self._evaluation: dict[Stage, list[EncodedTask]] = {}
        self._texts: dict[Stage, tuple[dict[str, str], dict[str, str]]] = {}
        self._saved: dict[str, Any] = {}

    def setup(self, stage: str) -> None:
        """Read what a stage (``fit``, ``validate``, ``test`` or ``predict``) needs; repeated calls cost nothing.

        Raises:
            InputError: Something is missing or broken in the data; the error names file, line and field.
        """
        sources = self.sources()
        if stage == "fit" and not self._datasets:
            for note in filter(None, (source.note() for source in sources)):
                rank_zero_info(note)
            self._sets, self._datasets, self.manifest = self._train_sets()
        self.evaluation("validate" if stage in ("fit", "validate") else "test")

    def sources(self) -> list[TaskSource]:
        """Return where sets and tasks come from, of which nothing is read yet.

        Raises:
            InputError: A path leads nowhere, or a name is that of no folder or file.
        """
        if not self._sources:
            sources = [source for path in self.paths for source in self._sources_of(path)]
            self._check_names(sources)
            self._sources = sources
        return self._sources

    def trains_on(self, name: str, kind: TaskType) -> bool:
        """Say whether a set of this name and task type is trained on."""
        of_type = self.types is None or kind in self.types
        return of_type and (self.train_on is None or name in self.train_on) and name not in self.leave_out

    def evaluation(self, stage: Stage) -> list[EncodedTask]:
        """Return the tasks of a stage, each with the keys of its texts among those encoded, after ``setup``."""
        if stage not in self._evaluation:
            tasks = [task for source in self._sources for task in source.evaluation(stage)]
            if not tasks:
                raise InputError("there is nothing to evaluate on", ", ".join(self.paths))
            if twice := [name for name, count in Counter(task.name for task in tasks).items() if count > 1]:
                raise InputError(f"there are two tasks '{twice[0]}'; rename a folder or file", field="path")
            queries, passages = _Texts(), _Texts()
            self._evaluation[stage] = [
                EncodedTask(
                    task,
                    queries.keys(task.name, task.queries, task.instruction if self.instructions else ""),
                    passages.keys(task.name, task.passages, ""),
                )
                for task in tasks
            ]
            self._texts[stage] = queries.texts, passages.texts
        return self._evaluation[stage]

    def texts(self, stage: Stage) -> tuple[dict[str, str], dict[str, str]]:
        """Return the distinct texts of both sides by the keys that ``evaluation`` names."""
        self.evaluation(stage)
        return self._texts[stage]

    def training_sets(self) -> dict[str, dict[str, Any]]:
        """Task type and rows of each set that is trained on, within ``limit``, before part and bag, after ``setup``."""
        return {of.task.name: {"type": of.task.type, "rows": self._size(of)} for of in self._sets}

    def train_dataloader(self) -> ResumableLoader:
        if self._saved:
            check_manifest(self._saved, self.manifest)
        names = [dataset.name for dataset in self._datasets]
        types = {of.task.name: of.task.type for of in self._sets}
        sampler = schedule_sampler(
            self.schedule,
            dict(zip(names, map(len, self._datasets), strict=True)),
            self.batch_sizes(),
            types,
            self.order,
            self.seed,
            self._rank,
            self._world_size,
        )
        collate = self._module.pair_collator(train=True)
        return ResumableLoader(MixedDataset(self._datasets), sampler, collate, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        return self._text_loaders("validate")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._text_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return whole_prediction(self._text_loaders("test"))

    def state_dict(self) -> dict[str, Any]:
        """Return what the rows of training were drawn from, to be checked when a run goes on."""
        return {"manifest": self.manifest}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the rows that a checkpoint was trained on in mind.

        Raises:
            InputError: They are not those of this run.
        """
        self._saved = state_dict.get("manifest", {})
        if self._saved and self.manifest:
            check_manifest(self._saved, self.manifest)

    def batch_sizes(self) -> list[int]:
        """Queries a device gets in a step of each set; a set too small for a batch on all devices makes smaller ones.

        Raises:
            InputError: A set has fewer rows than there are devices.
        """
        return [self._batch_size(of.task.batch_size, of.task.symmetric, dataset)
                for of, dataset in zip(self._sets, self._datasets, strict=True)]  # fmt: skip

    def _batch_size(self, own: int | None, symmetric: bool, dataset: PairDataset) -> int:
        wanted = self.batch_size if own is None else own
        wanted = max(1, wanted // 2) if symmetric else wanted
        fits = len(dataset) // self._world_size
        if fits < 1:
            raise InputError(
                f"the training set '{dataset.name}' has {len(dataset)} rows, too few for {self._world_size} devices"
            )
        if fits < wanted and self.schedule != "mixed":
            rank_zero_info(f"{dataset.name}: {len(dataset)} rows are less than a batch; a device gets {fits} a step")
        return min(wanted, fits)

    def _sources_of(self, path: str) -> list[Any]:
        if path == "families":
            return [FamiliesSource(self.families, self.base)]
        said = self.task_instructions if self.instructions else None
        return list(sources_of(path, said, self.held_out, self.limit, self.split_seed, self.beir))

    def _check_names(self, sources: Sequence[Any]) -> None:
        """Refuse names of folders or files that there are not."""
        known = [source.name for source in sources if not isinstance(source, FamiliesSource)]
        for field, names in (("held_out", self.held_out), ("task_instructions", self.task_instructions)):
            for name in names:
                if name not in known:
                    there = f"only {', '.join(known)}" if known else "as all sets are built in"
                    raise InputError(f"there is no folder or file '{name}', {there}", field=field)

    def _size(self, task_set: TaskSet) -> int:
        rows = len(task_set.task.examples)
        return rows if self.limit is None else min(rows, self.limit)

    def _train_sets(self) -> tuple[list[TaskSet], list[PairDataset], dict[str, Any]]:
        """The sets that are left after all filters, their datasets, and the manifest of their rows."""
        sets = [task_set for source in self._sources for task_set in source.train()]
        if not sets:
            raise InputError("everything is held out, so there is nothing to train on", field="held_out")
        names = [task_set.task.name for task_set in sets]
        for field, chosen, known in (
            ("train_on", self.train_on or [], names),
            ("leave_out", self.leave_out, names),
            ("new", self.new if isinstance(self.new, list) and self.part != "all" else [], names),
            ("types", self.types or [], [task_set.task.type for task_set in sets]),
        ):
            for name in chosen:
                if name not in known:
                    raise InputError(f"no training set '{name}', only {', '.join(dict.fromkeys(known))}", field=field)
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"there are two training sets '{twice}'; rename one of the files or folders", field="path")
        kept = [of for of in sets if self.trains_on(of.task.name, of.task.type)]
        if not kept:
            raise InputError("no training set is left; change types, train_on or leave_out")
        rows: dict[str, Rows] = {}
        for task_set in kept:
            name = task_set.task.name
            of_part = self.rows_of(name, self._size(task_set))
            if len(of_part):
                rows[name] = of_part[self.bag.rows(name, len(of_part))]
        kept = [task_set for task_set in kept if task_set.task.name in rows]
        if not kept:
            raise InputError(f"no training set has rows of part '{self.part}'", field="part")
        datasets = [self._dataset(task_set, rows[task_set.task.name]) for task_set in kept]
        growth = {"part": self.part, "new": self.new, "core": self.core, "split_seed": self.split_seed}
        sizes = {task_set.task.name: len(task_set.task.examples) for task_set in kept}
        contents = {dataset.name: _content(dataset.examples, rows[dataset.name]) for dataset in datasets}
        return kept, datasets, manifest({**asdict(self.bag), **growth}, rows, sizes, contents)

    def rows_of(self, name: str, size: int) -> Rows:
        """Rows of a set of ``size`` rows that belong to ``part``, before the bag is drawn."""
        everything = Bag().rows(name, size)
        if self.part == "all":
            return everything
        if isinstance(self.new, list):
            late = everything if name in self.new else everything[:0]
        else:
            late = late_rows(name, size, float(self.new or 0), self.split_seed)
        kept = set(late.tolist())
        old = everything[[row not in kept for row in everything.tolist()]]
        if self.part == "old":
            return old
        if self.part == "new":
            return late
        sample = core_rows(name, [old], self.bag.seed, self.core)
        both = [*sample.tolist(), *(late.tolist() if self.part == "core+new" else [])]
        return everything[sorted(both)]

    def _dataset(self, task_set: TaskSet, rows: Rows) -> PairDataset:
        task = task_set.task
        negatives = self.negatives if task_set.most_negatives is None else min(self.negatives, task_set.most_negatives)
        examples = with_instruction(task) if self.instructions else task.examples
        if negatives and self.hard_negatives == "bm25":
            examples = add_bm25_negatives(examples, task_set.corpus, negatives, self.split_seed)
        if self.schedule == "mixed":  # rows of several collections meet in a batch, and their ids may be the same
            examples = [apart(example, task_of(task.name)) for example in examples]
        return PairDataset(examples, task.name, negatives, task.own_group_only, rows.tolist())

    def _text_loaders(self, stage: Stage) -> list[DataLoader[Any]]:
        queries, passages = self.texts(stage)
        loaders = [self._text_loader(queries, "query")]
        return [*loaders, self._text_loader(passages, "passage")] if passages else loaders


class _Texts:
    """Distinct texts, each under the first name it came with."""

    def __init__(self) -> None:
        self.texts: dict[str, str] = {}
        self._first: dict[str, str] = {}

    def keys(self, task: str, texts: Mapping[str, str], instruction: str) -> dict[str, str]:
        found = {}
        for text_id, text in texts.items():
            said = instruct(instruction, text)
            found[text_id] = self._first.setdefault(said, f"{task}/{text_id}")
            self.texts[found[text_id]] = said
        return found


def _content(examples: Any, rows: Rows) -> str:
    """Hash of queries and positives, in the order of the rows."""
    digest = blake2b(digest_size=8)
    for row in rows.tolist():
        example: Example = examples[row]
        digest.update("\0".join((example.query, *(p.doc_id for p in example.positives), "")).encode("utf-8", "replace"))
    return digest.hexdigest()
