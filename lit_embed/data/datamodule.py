"""The data of retrieval experiments: training pairs, and the queries and passages they are evaluated on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader

from lit_core.datasets import load_rows
from lit_core.errors import InputError
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.samplers import HomogeneousBatchSampler, permutation
from lit_embed.data.beir import pairs_from_qrels
from lit_embed.data.dataset import MixedDataset, PairDataset
from lit_embed.data.encoding import EncodingDataModule, whole_prediction
from lit_embed.data.huggingface import StreamLoader, load_examples, row_parser
from lit_embed.data.negatives import add_bm25_negatives
from lit_embed.data.pairs import read_pairs
from lit_embed.data.records import Collection, Example, PairItem
from lit_embed.data.sources import HELD_OUT_ROWS, BeirSource, RowSource, Source, Stage, TrainSet, WorldSource, kind_of
from lit_embed.data.stream import StreamSource
from lit_embed.data.world import WorldConfig

DEFAULT_WORLD = WorldConfig()


class RetrievalDataModule(EncodingDataModule):
    """Pairs to train on, and collections to validate and test on, from any source.

    Validation gives three loaders, ``[queries, corpus, pairs]``; testing and prediction give ``[queries, corpus]``.
    A text may come twice where devices do not share out evenly: drop duplicates by id. The trainer needs
    ``use_distributed_sampler=False``: the samplers shard by rank themselves.

    Args:
        path: ``world`` (built in, nothing to download), a BEIR folder, a JSONL file of pairs or triples, or a Hugging
            Face dataset (hub id, folder or file). With several, batches are drawn from each in proportion to its size,
            and the first is evaluated on.
        batch_size: Queries a device gets per step.
        negatives: Hard negatives per query; needs a source that has them, or ``hard_negatives``.
        hard_negatives: ``bm25`` finds negatives for examples without any.
        pairs: What to train on in a BEIR folder: ``qrels`` (its train split), ``title`` (title against text),
            ``sentence`` (first sentence against the rest), or ``auto``: the train split and the titles, first
            sentences where there is neither.
        val_split: Split to validate on. A BEIR folder without ``dev`` is validated on pairs held out from training (a
            tenth, at most 200), never on the test split.
        test_split: Split to test on and predict.
        own_group_only: Contrast queries with their own passages alone: everywhere, or in the training sets named.
        world: The built-in collection.
        val_pairs: Pairs for the validation loss; 0 leaves their loader out.
        token_budget: Padded tokens of a batch in encoding, estimated as four bytes each.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and draws.
        split_seed: Seed of what is held out; the same for all seeds, so that they are tested on the same queries.
        limit: Train on this many examples of each set at most, for trials; of a file, not many more rows are read.
        hf_config: Configuration of a Hugging Face dataset.
        hf_split: Its split to read.
        hf_columns: Its column for each field, such as ``{query: question, positive: answer}``.
        streaming: Read the Hugging Face dataset as a stream.
        steps_per_epoch: Batches that make an epoch of a stream.

    Raises:
        InputError: An argument is out of range.
    """

    def __init__(
        self,
        path: str | list[str] = "world",
        batch_size: int = 32,
        negatives: int = 0,
        hard_negatives: Literal["none", "bm25"] = "none",
        pairs: Literal["auto", "qrels", "title", "sentence"] = "auto",
        val_split: str = "dev",
        test_split: str = "test",
        own_group_only: bool | list[str] = False,
        world: WorldConfig = DEFAULT_WORLD,
        val_pairs: int = 256,
        token_budget: int = 8192,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
        limit: int | None = None,
        hf_config: str | None = None,
        hf_split: str = "train",
        hf_columns: dict[str, str] | None = None,
        streaming: bool = False,
        steps_per_epoch: int = 1000,
    ) -> None:
        super().__init__(token_budget, num_workers)
        for name, value, least in (
            ("batch_size", batch_size, 1), ("negatives", negatives, 0), ("val_pairs", val_pairs, 0),
            ("token_budget", token_budget, 1), ("num_workers", num_workers, 0), ("steps_per_epoch", steps_per_epoch, 1),
            ("limit", 1 if limit is None else limit, 1),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        self.paths = [path] if isinstance(path, str) else list(path)
        if not self.paths:
            raise InputError("needs at least one path", field="path")
        if streaming and (len(self.paths) > 1 or kind_of(self.paths[0]) != "huggingface"):
            raise InputError(
                "a stream is one Hugging Face dataset; set streaming to false for other paths", field="path"
            )
        if streaming and (hard_negatives != "none" or limit is not None):
            field = "limit" if limit is not None else "hard_negatives"
            raise InputError("not available for a stream, whose rows are not known beforehand", field=field)
        self.batch_size, self.negatives, self.hard_negatives, self.pairs = batch_size, negatives, hard_negatives, pairs
        self.val_split, self.test_split, self.own_group_only, self.world = val_split, test_split, own_group_only, world
        self.val_pairs, self.seed, self.split_seed, self.limit = val_pairs, seed, split_seed, limit
        self.streaming, self.steps_per_epoch = streaming, steps_per_epoch
        self.hf_config, self.hf_split, self.hf_columns = hf_config, hf_split, hf_columns
        self._sources: list[Source] = []
        self._datasets: list[PairDataset] = []
        self._collections: dict[Stage, Collection] = {}
        self._bm25: dict[tuple[Stage, int], dict[str, dict[str, float]]] = {}
        self._train_loader: ResumableLoader | StreamLoader | None = None
        self._stream_state: dict[str, Any] | None = None

    def prepare_data(self) -> None:
        """Download Hugging Face datasets once a machine."""
        for path in self.paths:
            if kind_of(path) == "huggingface" and not self.streaming:
                load_rows(path, self.hf_config, self.hf_split)

    def setup(self, stage: str) -> None:
        """Read what a stage (``fit``, ``validate``, ``test`` or ``predict``) needs; repeated calls cost nothing.

        Raises:
            InputError: Something is missing or broken in the data; the error names file, line and field.
        """
        if not self._sources:
            self._sources = [self._source(path) for path in self.paths]
        if stage == "fit" and not self._datasets and not self.streaming:
            self._datasets = self._train_datasets()
        if stage in ("fit", "validate"):
            if "validate" not in self._collections and (note := self._sources[0].note()):
                rank_zero_info(note)
            self.collection("validate")
        else:
            self.collection("test")

    def collection(self, stage: Stage) -> Collection:
        """Return the texts and judgements of a stage, after ``setup``."""
        if stage not in self._collections:
            self._collections[stage] = self._sources[0].collection(stage)
        return self._collections[stage]

    def bm25_run(self, stage: Stage, top_k: int) -> dict[str, dict[str, float]]:
        """Return a BM25 run over a stage's collection; computed once."""
        from lit_embed.retrieval.bm25 import BM25

        if (stage, top_k) not in self._bm25:
            collection = self.collection(stage)
            self._bm25[stage, top_k] = BM25(collection.corpus).search(collection.queries, top_k)
        return self._bm25[stage, top_k]

    def train_dataloader(self) -> ResumableLoader | StreamLoader:
        collate = self._module.pair_collator(train=True)
        if self.streaming:
            self._train_loader = self._stream_loader(collate)
            return self._train_loader
        sizes = [len(dataset) for dataset in self._datasets]
        whole = self.batch_size * self._world_size  # sets too small for one batch are not left out: see drop_last
        sampler = HomogeneousBatchSampler(
            sizes, self.batch_size, self.seed, self._rank, self._world_size, drop_last=min(sizes) >= whole
        )
        return ResumableLoader(MixedDataset(self._datasets), sampler, collate, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        loaders = self._text_loaders("validate")
        return [*loaders, self._pair_loader()] if self.val_pairs else loaders

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return self._text_loaders("test")

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return whole_prediction(self._text_loaders("test"))

    def state_dict(self) -> dict[str, Any]:
        """Return the position in a stream; loaders of other sources are saved by the trainer itself."""
        return {"stream": self._train_loader.state_dict()} if isinstance(self._train_loader, StreamLoader) else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the position in a stream, also where a checkpoint was written between two epochs."""
        self._stream_state = state_dict.get("stream")

    def _source(self, path: str) -> Source:
        kind = kind_of(path)
        if kind == "world":
            return WorldSource(self.world, self.val_split, self.test_split)
        if kind == "beir":
            return BeirSource(path, self.pairs, self.val_split, self.test_split, self.split_seed)
        rows_limit = None if self.limit is None else self.limit + 2 * HELD_OUT_ROWS[1]
        name = Path(path).stem if Path(path).exists() else path
        if kind == "jsonl":
            return RowSource(name, partial(read_pairs, path, limit=rows_limit), self.split_seed)
        if self.streaming:
            rows = load_rows(path, self.hf_config, self.hf_split, streaming=True)
            return StreamSource(name, rows, row_parser(path, self.hf_columns), self.split_seed)
        read = partial(load_examples, path, self.hf_config, self.hf_split, self.hf_columns, rows_limit)
        return RowSource(name, read, self.split_seed)

    def _train_datasets(self) -> list[PairDataset]:
        sets = [train_set for source in self._sources for train_set in source.train_sets()]
        names = [train_set.name for train_set in sets]
        if isinstance(self.own_group_only, list):
            known = {*names, *(source.name for source in self._sources)}
            unknown = [name for name in self.own_group_only if name not in known]
            if unknown:
                raise InputError(f"no training set '{unknown[0]}', only {', '.join(names)}", field="own_group_only")
        return [self._train_dataset(train_set) for train_set in sets]

    def _train_dataset(self, train_set: TrainSet) -> PairDataset:
        examples: list[Example] = train_set.examples[: self.limit]
        if self.negatives and self.hard_negatives == "bm25":
            examples = add_bm25_negatives(examples, train_set.corpus, self.negatives, self.seed)
        return PairDataset(examples, train_set.name, self.negatives, self._alone(train_set.name))

    def _alone(self, name: str) -> bool:
        """Whether a set's queries meet only their own passages; a set may be named with or without its kind."""
        if isinstance(self.own_group_only, bool):
            return self.own_group_only
        return any(name == asked or name.startswith(f"{asked}/") for asked in self.own_group_only)

    def _stream_loader(self, collate: Callable[[list[PairItem]], Any]) -> StreamLoader:
        source = cast(StreamSource, self._sources[0])
        loader = StreamLoader(
            source.training_rows(), source.parse_training, collate, self.batch_size, self.steps_per_epoch, source.name,
            self.negatives, self._alone(source.name), self.seed, self._rank, self._world_size,
        )  # fmt: skip
        if self._stream_state is not None:
            loader.load_state_dict(self._stream_state)
        return loader

    def _text_loaders(self, stage: Stage) -> list[DataLoader[Any]]:
        collection = self.collection(stage)
        return [self._text_loader(collection.queries, "query"), self._text_loader(collection.corpus, "passage")]

    def _pair_loader(self) -> DataLoader[Any]:
        """Return validation pairs: the same ones, and the same positives, every time."""
        examples = pairs_from_qrels(self.collection("validate"))
        chosen = sorted(permutation(len(examples), self.split_seed, 3)[: self.val_pairs])
        dataset = MixedDataset([PairDataset([examples[row] for row in chosen], "validation")])
        sampler = HomogeneousBatchSampler(
            dataset.sizes, self.batch_size, self.seed, self._rank, self._world_size, drop_last=False, shuffle=False
        )
        collate = self._module.pair_collator(train=False)
        return plain_loader(dataset, sampler, collate, self.num_workers)
