"""Where training examples and collections come from: the built-in world, a BEIR folder, or rows of pairs."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from lit_core.errors import InputError
from lit_core.samplers import permutation
from lit_embed.data.beir import Document, available_splits, pairs_from_qrels, read_documents, read_qrels, read_queries
from lit_embed.data.pseudo import pseudo_collection, pseudo_pairs
from lit_embed.data.records import Collection, Example
from lit_embed.data.world import WorldConfig, build_world

PairKind = Literal["auto", "qrels", "title", "sentence"]
Stage = Literal["validate", "test"]

HELD_OUT_PAIRS = (0.10, 200)  # share and most of pseudo pairs that stand in for a missing validation split
HELD_OUT_ROWS = (0.05, 200)  # share and most of a file's rows for validation, and again for testing
OTHER_PASSAGES = 2000  # passages beside those of the held-out rows in their collection


class TrainSet(NamedTuple):
    """Examples that make homogeneous batches, and the passages among which negatives may be mined."""

    name: str
    examples: list[Example]
    corpus: dict[str, str]


class Source(Protocol):
    """Something to train and evaluate on; everything is a function of its arguments, the same on all ranks."""

    name: str

    def train_sets(self) -> list[TrainSet]:
        """Return the training examples, without those held out for validation or testing."""
        ...

    def collection(self, stage: Stage) -> Collection:
        """Return what a stage is evaluated on."""
        ...

    def note(self) -> str | None:
        """Return what the user should know about the validation data, if anything."""
        ...


@dataclass
class WorldSource:
    """The built-in synthetic collection; its splits are ``train``, ``dev`` and ``test``.

    Training has the passages about its own entities, evaluation those about all others, which training never saw.
    """

    config: WorldConfig
    val_split: str = "dev"
    test_split: str = "test"
    name: str = "world"

    def train_sets(self) -> list[TrainSet]:
        collection = self._split("train")
        return [TrainSet(self.name, pairs_from_qrels(collection), collection.corpus)]

    def collection(self, stage: Stage) -> Collection:
        return self._split(self.val_split if stage == "validate" else self.test_split)

    def note(self) -> str | None:
        return None

    def _split(self, split: str) -> Collection:
        world = build_world(self.config)
        if split not in world.queries:
            raise InputError(f"the built-in world has no split '{split}', only {', '.join(world.queries)}")
        training = split == "train"
        corpus = {
            doc_id: text
            for doc_id, text in world.corpus.items()
            if (world.entities[world.documents[doc_id].entity].split == "train") == training
        }
        return Collection(self.name, corpus, world.queries[split], world.qrels[split])


@dataclass
class BeirSource:
    """A BEIR folder; see ``RetrievalDataModule`` for the meaning of the fields."""

    folder: str
    pairs: PairKind = "auto"
    val_split: str = "dev"
    test_split: str = "test"
    seed: int = 0
    name: str = field(init=False)

    def __post_init__(self) -> None:
        self.name = Path(self.folder).resolve().name

    def train_sets(self) -> list[TrainSet]:
        return [self._train_set(kind, self._kept(kind, examples)) for kind, examples in self._examples.items()]

    def collection(self, stage: Stage) -> Collection:
        if stage == "test" or not self._held_out_kind:
            return self._split(self.test_split if stage == "test" else self.val_split)
        examples = self._examples[self._held_out_kind]
        held_out = [examples[row] for row in self._held_out_rows(self._held_out_kind)]
        if self._held_out_kind == "qrels":
            train = self._split("train")
            ids = [example.query_id for example in held_out]
            queries, qrels = {i: train.queries[i] for i in ids}, {i: train.qrels[i] for i in ids}
            return Collection(self.name, train.corpus, queries, qrels)
        return pseudo_collection(self.name, self._documents, held_out, examples)

    def note(self) -> str | None:
        if not self._held_out_kind:
            return None
        count, total = len(self._held_out_rows(self._held_out_kind)), len(self._examples[self._held_out_kind])
        return (
            f"{self.folder} has no split '{self.val_split}': validation uses {count} of {total} {self._held_out_kind} "
            "pairs, which are not trained on"
        )

    @cached_property
    def _documents(self) -> dict[str, Document]:
        return read_documents(self.folder)

    @cached_property
    def _examples(self) -> dict[str, list[Example]]:
        """Examples by kind: judged queries, titles, first sentences."""
        kinds = {"auto": ["qrels", "title"]}.get(self.pairs, [self.pairs])
        if self.pairs == "auto" and "train" not in available_splits(self.folder):
            kinds.remove("qrels")
        found = {kind: self._read(kind) for kind in kinds}
        found = {kind: examples for kind, examples in found.items() if examples}
        if not found and self.pairs == "auto":
            found = {"sentence": self._read("sentence")}
        if not any(found.values()):
            raise InputError(f"no training pairs of kind '{self.pairs}' can be made from this folder", self.folder)
        return found

    @cached_property
    def _held_out_kind(self) -> str | None:
        """Kind of pairs that stand in for a validation split, ``None`` where there is one."""
        if self.val_split in available_splits(self.folder):
            return None
        if self.val_split != "dev":  # asked for by name: _split tells which splits there are
            self._split(self.val_split)
        return list(self._examples)[-1]

    def _read(self, kind: str) -> list[Example]:
        if kind == "qrels":
            return pairs_from_qrels(self._split("train"))
        return pseudo_pairs(self._documents, "title" if kind == "title" else "sentence")

    def _split(self, split: str) -> Collection:
        queries = read_queries(self.folder)
        qrels = read_qrels(self.folder, split, queries, self._documents)
        corpus = {doc_id: document.full_text for doc_id, document in self._documents.items()}
        return Collection(self.name, corpus, {query_id: queries[query_id] for query_id in qrels}, qrels)

    def _held_out_rows(self, kind: str) -> list[int]:
        if kind != self._held_out_kind:
            return []
        examples = self._examples[kind]
        share, most = HELD_OUT_PAIRS
        count = min(most, max(1, int(share * len(examples))))
        return sorted(permutation(len(examples), self.seed, 1)[:count])

    def _kept(self, kind: str, examples: list[Example]) -> list[Example]:
        held_out = set(self._held_out_rows(kind))
        return [example for row, example in enumerate(examples) if row not in held_out]

    def _train_set(self, kind: str, examples: list[Example]) -> TrainSet:
        corpus = {doc_id: document.full_text for doc_id, document in self._documents.items()}
        if kind != "qrels":
            corpus |= {passage.doc_id: passage.text for e in self._examples[kind] for passage in e.positives}
        return TrainSet(f"{self.name}/{kind}", examples, corpus)


@dataclass
class RowSource:
    """Rows of pairs from a file or a Hugging Face dataset, without splits of their own.

    5 % of the examples, at most 200, are held out for validation and as many for testing; their positives and
    negatives and up to 2,000 other passages are the corpus they are evaluated on.
    """

    name: str
    read: Callable[[], list[Example]]
    seed: int = 0

    def train_sets(self) -> list[TrainSet]:
        held_out = {row for rows in self._held_out.values() for row in rows}
        examples = [example for row, example in enumerate(self._examples) if row not in held_out]
        return [TrainSet(self.name, examples, _passages(self._examples))]

    def collection(self, stage: Stage) -> Collection:
        examples = [self._examples[row] for row in self._held_out[stage]]
        return held_out_collection(self.name, examples, self._examples, self.seed)

    def note(self) -> str | None:
        sizes = {stage: len(rows) for stage, rows in self._held_out.items()}
        return (
            f"{self.name} has no splits: {sizes['validate']} of {len(self._examples)} examples are held out for "
            f"validation, {sizes['test']} for testing"
        )

    @cached_property
    def _examples(self) -> list[Example]:
        return self.read()

    @cached_property
    def _held_out(self) -> dict[str, list[int]]:
        total, (share, most) = len(self._examples), HELD_OUT_ROWS
        if total < 3:
            raise InputError(f"{total} examples are too few to train, validate and test on; need at least 3", self.name)
        count = min(most, max(1, int(share * total)))
        order = permutation(total, self.seed, 2)
        return {"validate": sorted(order[:count]), "test": sorted(order[count : 2 * count])}


def held_out_collection(name: str, examples: list[Example], everything: list[Example], seed: int) -> Collection:
    """Build a collection from held-out examples; the corpus is their passages and a sample of all others."""
    corpus = _passages(examples)
    others = [(doc_id, text) for doc_id, text in _passages(everything).items() if doc_id not in corpus]
    corpus |= dict(random.Random(seed).sample(others, min(OTHER_PASSAGES, len(others))))
    qrels = {example.query_id: {passage.doc_id: 1 for passage in example.positives} for example in examples}
    if len(qrels) < len(examples):
        raise InputError("different queries have the same query_id", name, field="query_id")
    return Collection(name, corpus, {example.query_id: example.query for example in examples}, qrels)


def kind_of(path: str) -> Literal["world", "beir", "jsonl", "huggingface"]:
    """Tell what a path is: the built-in world, a BEIR folder, a JSONL file, or something for ``datasets``.

    Raises:
        InputError: The path does not exist and cannot be a hub id.
    """
    place = Path(path)
    if path == "world":
        return "world"
    if place.is_file():
        return "jsonl" if place.suffix == ".jsonl" else "huggingface"
    if place.is_dir():
        data = [file for file in place.rglob("*") if file.suffix in (".parquet", ".arrow", ".csv", ".json", ".jsonl")]
        beir = any((place / name).exists() for name in ("corpus.jsonl", "queries.jsonl", "qrels"))
        return "beir" if beir or not data else "huggingface"
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", path) or place.suffix in (".jsonl", ".json", ".parquet", ".csv"):
        raise InputError("no such file or folder", path)
    return "huggingface"


def _passages(examples: list[Example]) -> dict[str, str]:
    return {passage.doc_id: passage.text for e in examples for passage in (*e.positives, *e.negatives)}
