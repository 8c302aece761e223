"""Where several training sets of different task types and their evaluation tasks come from."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol, get_args

from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track
from lit_embed.data.families import DOMAINS, FamiliesConfig, TrainTask, build_families, plan
from lit_embed.data.pairs import PairReader, corpus_beside
from lit_embed.data.records import Collection, Example, Passage, merge_examples
from lit_embed.data.sources import BeirSource, RowSource, Stage, kind_of
from lit_embed.retrieval.tasks import EvalTask, Retrieval, TaskType

INSTRUCTION = "Instruct: {instruction}\nQuery: {text}"  # one for training and evaluation, as they must agree
OWN_GROUP_SUFFIX = "no_in_batch_neg"  # of a file's or folder's name, as FlagEmbedding has it
SETTINGS = ("prompt", "type", "batch_size")  # fields of rows that hold for a whole file
KINDS: dict[str, TaskType] = {"sts": "sts", "class": "classification", "clustering": "clustering"}  # symmetric_<kind>


def instruct(instruction: str, text: str) -> str:
    """Put a task's instruction before a text; an empty one leaves it as it is."""
    return INSTRUCTION.format(instruction=instruction, text=text) if instruction else text


def task_of(name: str) -> str:
    """Name of the task that a training set is evaluated by: a BEIR folder has a set for each kind of pair."""
    return name.partition("/")[0]


class TaskSet(NamedTuple):
    """A training set, the passages among which negatives may be mined, and how many negatives it has at most."""

    task: TrainTask
    corpus: dict[str, str]
    most_negatives: int | None = None


class TaskSource(Protocol):
    """Training sets and evaluation tasks; everything is a function of its arguments, the same on all ranks."""

    def types(self) -> dict[str, TaskType]:
        """Return the task type of each set that there may be to train on, by name, without reading the sets."""
        ...

    def train(self) -> list[TaskSet]:
        """Return the training sets, without examples held out for validation or testing."""
        ...

    def evaluation(self, stage: Stage) -> list[EvalTask]:
        """Return what a stage is evaluated on."""
        ...

    def note(self) -> str | None:
        """Return what the user should know about the validation data, if anything."""
        ...


@dataclass
class FamiliesSource:
    """The built-in families, or the sets for their base."""

    config: FamiliesConfig
    base: bool = False

    def types(self) -> dict[str, TaskType]:
        if self.base:
            return {f"{domain}-base": "retrieval" for domain in DOMAINS}
        return {f"{domain.name}-{kind}": kind for kind, domain, _ in plan(self.config)}

    def train(self) -> list[TaskSet]:
        families = build_families(self.config)
        return [TaskSet(task, {}) for task in (families.base if self.base else families.train)]

    def evaluation(self, stage: Stage) -> list[EvalTask]:
        families = build_families(self.config)
        return families.test if stage == "test" else families.validation

    def note(self) -> str | None:
        return None


@dataclass
class FolderSource:
    """A BEIR folder: each kind of pair a training set, the collection a retrieval task."""

    source: BeirSource
    instruction: str = ""
    held_out: bool = False

    @property
    def name(self) -> str:
        """That of the folder, and of its task."""
        return self.source.name

    def types(self) -> dict[str, TaskType]:
        return {} if self.held_out else {f"{self.name}/{kind}": "retrieval" for kind in ("qrels", "title", "sentence")}

    def train(self) -> list[TaskSet]:
        sets = [] if self.held_out else self.source.train_sets()
        return [
            TaskSet(TrainTask(s.name, "retrieval", s.examples, False, False, self.instruction), s.corpus) for s in sets
        ]

    def evaluation(self, stage: Stage) -> list[EvalTask]:
        collection = self.source.collection(stage)
        return [_retrieval(collection, "out" if self.held_out else "in", self.instruction)]

    def note(self) -> str | None:
        return None if self.held_out else self.source.note()


@dataclass
class FileSource:
    """A JSONL file of pairs, a training set; examples held out of it make a retrieval task.

    A FlagEmbedding file may say ``prompt`` (its instruction), ``type`` and ``batch_size`` in its rows, the same in all
    of them. A type that contains ``symmetric`` puts the instruction before passages too; ``only_1neg`` allows one
    negative. In a file or folder whose name ends with ``no_in_batch_neg`` queries meet only their own passages.

    Args:
        path: The file.
        instruction: The task in words, where the rows have no prompt.
        held_out: Evaluate on it alone.
        limit: Read this many rows at most.
        seed: Seed of what is held out.
        instructions: False leaves all instructions out.
    """

    path: Path
    instruction: str = ""
    held_out: bool = False
    limit: int | None = None
    seed: int = 0
    instructions: bool = True

    @property
    def name(self) -> str:
        """That of the file, and of its set and its task."""
        return self.path.stem

    def types(self) -> dict[str, TaskType]:
        _, first = next(read_jsonl(self.path), (0, {}))
        return {} if self.held_out else {self.name: type_of(str(first.get("type", "")))}

    @cached_property
    def _read(self) -> tuple[TrainTask, int | None]:
        examples, shared = read_task_rows(self.path, self.limit)
        size, kind = shared.get("batch_size"), str(shared.get("type", ""))
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise InputError(f"must be a whole number of at least 1, got {size!r}", self.path, field="batch_size")
        own = any(name.endswith(OWN_GROUP_SUFFIX) for name in (self.path.stem, self.path.resolve().parent.name))
        instruction, symmetric = str(shared.get("prompt", self.instruction)), "symmetric" in kind
        instruction = instruction if self.instructions else ""
        task = TrainTask(self.name, type_of(kind), examples, own, symmetric, instruction, size)
        return task, 1 if kind == "only_1neg" else None

    @cached_property
    def _rows(self) -> RowSource:
        return RowSource(self.name, lambda: self._read[0].examples, self.seed)

    def train(self) -> list[TaskSet]:
        task, most_negatives = self._read
        sets = [] if self.held_out else self._rows.train_sets()
        return [TaskSet(replace(task, examples=s.examples), s.corpus, most_negatives) for s in sets]

    def evaluation(self, stage: Stage) -> list[EvalTask]:
        task, collection = self._read[0], self._rows.collection(stage)
        return [_retrieval(collection, "out" if self.held_out else "in", task.instruction, task.symmetric)]

    def note(self) -> str | None:
        return None if self.held_out else self._rows.note()


def sources_of(
    path: str,
    instructions: Mapping[str, str] | None,
    held_out: list[str],
    limit: int | None,
    seed: int,
    beir: Mapping[str, Any],
) -> list[FolderSource | FileSource]:
    """Sources of a BEIR folder, a JSONL file, or a folder of such files.

    Args:
        path: Folder or file.
        instructions: Instruction by name of folder or file; None leaves all out, those of rows too.
        held_out: Names of what is evaluated on alone.
        limit: Rows read of a file at most.
        seed: Seed of what is held out.
        beir: Further arguments of ``BeirSource``.

    Raises:
        InputError: It is neither.
    """
    kind, place, by_name = kind_of(path), Path(path), instructions or {}
    if kind == "beir":
        source = BeirSource(path, **beir, seed=seed)
        return [FolderSource(source, by_name.get(source.name, ""), source.name in held_out)]
    files = [place] if kind == "jsonl" else sorted(place.glob("*.jsonl")) if place.is_dir() else []
    if not files:
        raise InputError("is neither 'families' nor a BEIR folder, a JSONL file or a folder of JSONL files", path)
    said = instructions is not None
    return [FileSource(f, by_name.get(f.stem, ""), f.stem in held_out, limit, seed, said) for f in files]


def read_task_rows(path: Path, limit: int | None = None) -> tuple[list[Example], dict[str, Any]]:
    """Read a JSONL file of pairs, and the settings that its rows share (``prompt``, ``type``, ``batch_size``).

    Raises:
        InputError: The file is missing, empty or broken, or rows differ in a setting.
    """
    reader = PairReader(path, corpus_beside(path))
    shared: dict[str, Any] | None = None
    examples = []
    for line, row in track(islice(read_jsonl(path), limit), f"reading {path.name}", unit="row"):
        settings = {field: row.pop(field, None) for field in SETTINGS}
        shared = settings if shared is None else shared
        for field, value in settings.items():
            if value != shared[field]:
                message = f"is {value!r}, was {shared[field]!r} before; put rows of another {field} into another file"
                raise InputError(message, path, line, field)
        examples.append(reader.parse(row, line))
    if shared is None:
        raise InputError("the file has no rows", path)
    return merge_examples(examples), {field: value for field, value in shared.items() if value is not None}


def type_of(kind: str) -> TaskType:
    """Task type of a row's ``type``: one of ours, FlagEmbedding's ``symmetric_<kind>``, or retrieval."""
    types: dict[str, TaskType] = {name: name for name in get_args(TaskType)}
    return types.get(kind, KINDS.get(kind.removeprefix("symmetric_"), "retrieval"))


def with_instruction(task: TrainTask) -> list[Example]:
    """Examples with the task's instruction before their queries, and their passages too in a symmetric set."""
    if not task.instruction:
        return task.examples

    def said(passages: tuple[Passage, ...]) -> tuple[Passage, ...]:
        if not task.symmetric:
            return passages
        return tuple(Passage(doc_id, instruct(task.instruction, text)) for doc_id, text in passages)

    return [
        e._replace(query=instruct(task.instruction, e.query), positives=said(e.positives), negatives=said(e.negatives))
        for e in task.examples
    ]


def apart(example: Example, collection: str) -> Example:
    """An example whose passages have ids that no other collection has."""

    def named(passages: tuple[Passage, ...]) -> tuple[Passage, ...]:
        return tuple(Passage(f"{collection}/{doc_id}", text) for doc_id, text in passages)

    return example._replace(positives=named(example.positives), negatives=named(example.negatives))


def _retrieval(collection: Collection, domain: str, instruction: str, symmetric: bool = False) -> Retrieval:
    """The task of a collection; empty passages, and queries that are left without a relevant one, are left out."""
    corpus = {doc_id: text for doc_id, text in collection.corpus.items() if text.strip()}
    judged = {q: {d: grade for d, grade in of.items() if d in corpus} for q, of in collection.qrels.items()}
    qrels = {query_id: grades for query_id, grades in judged.items() if max(grades.values(), default=0) > 0}
    if symmetric:
        corpus = {doc_id: instruct(instruction, text) for doc_id, text in corpus.items()}
    return Retrieval.from_collection(replace(collection, corpus=corpus, qrels=qrels), domain, instruction)
