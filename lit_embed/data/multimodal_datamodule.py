"""The data of multimodal experiments: rows of three stages of training, and items to encode for evaluation."""

import random
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from lightning.pytorch.utilities import rank_zero_info
from torch.utils.data import DataLoader, Dataset

from lit_core.datamodule import RankedDataModule
from lit_core.errors import InputError
from lit_core.loader import ResumableLoader, plain_loader
from lit_core.samplers import HomogeneousBatchSampler, LengthSortedBatchSampler, ResumableBatchSampler, permutation
from lit_embed.data.distinct import DistinctBatchSampler
from lit_embed.data.encoding import whole_prediction
from lit_embed.data.multimodal_sources import FileSource, MultimodalSource, Part, SceneSource, Stage
from lit_embed.data.scenes import SceneConfig
from lit_embed.multimodal import (
    ChoiceTask,
    ContrastiveRow,
    EncodeRow,
    ItemPair,
    Key,
    ReconstructionRow,
    TargetPair,
    TrainStage,
    WarmupRow,
    encode_rows,
)

DEFAULT_SCENES = SceneConfig()


class MultimodalCollating(Protocol):
    """What the data module needs of the LightningModule: tokens and pixels belong to the model."""

    def multimodal_collator(self, stage: TrainStage, train: bool) -> Callable[[list[Any]], Any]:
        """Return a function that makes a batch of a stage's rows, for training or validation.

        They are ``WarmupRow``, ``ReconstructionRow`` or ``ContrastiveRow``.
        """
        ...

    def item_collator(self) -> Callable[[list[EncodeRow]], Any]:
        """Return a function that makes a batch of items to encode."""
        ...


class KeyedRows(Dataset[Any]):
    """Rows addressed by ``(dataset, row, seed)``; items are pure functions of row and seed."""

    def __init__(self, datasets: Sequence[Sequence[Any]], make: Callable[[Any, int], Any]) -> None:
        self.datasets, self.make = datasets, make

    def __len__(self) -> int:
        return sum(map(len, self.datasets))

    def __getitem__(self, key: tuple[int, int, int]) -> Any:
        dataset, row, seed = key
        return self.make(self.datasets[dataset][row], seed)


class ItemRows(Dataset[EncodeRow]):
    """Items addressed by number."""

    def __init__(self, rows: Sequence[EncodeRow]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> EncodeRow:
        return self.rows[number]


def _reconstruction(pair: TargetPair, seed: int) -> ReconstructionRow:
    return ReconstructionRow(*pair, seed)


def _contrastive(pair: ItemPair, seed: int) -> ContrastiveRow:
    return ContrastiveRow(pair.query, pair.positive, pair.negative, pair.task, seed)


_MAKE: dict[TrainStage, Callable[[Any, int], Any]] = {
    "warmup": WarmupRow,
    "reconstruction": _reconstruction,
    "contrastive": _contrastive,
}


class MultimodalDataModule(RankedDataModule):
    """Images, texts and pairs to train on in one of three stages, and tasks to evaluate on.

    In the contrastive stage validation gives two loaders, ``[items, pairs]``, otherwise one, ``[rows]``. Testing and
    prediction give ``[items]``; without evaluation rows the other stages are not tested. An item may come twice where
    devices do not share out evenly: drop duplicates by number. ``items`` lists what the numbers mean, ``evaluation``
    what is asked. The trainer needs ``use_distributed_sampler=False``: the samplers shard by rank themselves.

    Args:
        path: ``scenes`` (built in, nothing to download), a folder in MMEB's layout, or a file (JSON list, JSONL,
            parquet): of ``image_path`` and ``caption`` for the warm-up, of ``qry``, ``qry_image_path`` and
            ``pos_text`` for reconstruction, of MMEB's training rows for the contrastive stage.
        stage: ``warmup`` gives images with captions, ``reconstruction`` queries with target texts (pairs whose target
            is an image are left out), ``contrastive`` pairs.
        batch_size: Rows a device gets per step.
        eval_batch_size: Items of a batch in evaluation.
        task_mix: Weight of each task among the contrastive pairs, such as ``{vqa: 2, retrieval_i2t: 1}``: as many pairs
            are used as these proportions allow, tasks without a weight not at all. All pairs if None.
        one_task_batches: Make each contrastive batch of one task, as VLM2Vec-V2 does, instead of all.
        limit: Share of the contrastive pairs to train on, the same for all seeds; a smaller share is part of a larger.
        scenes: The built-in pictures.
        split: Split of MMEB's training files, ``original`` or ``diverse_instruction``.
        rows_per_task: Rows of each task, or of a file, to read at most (MMEB's authors: 100,000).
        image_root: What images of the training rows are relative to; ``path``, or its folder, if None.
        eval_path: Folder of MMEB's evaluation rows, which testing needs; ``path`` if None and if it holds such rows.
        eval_image_root: What their images are relative to; ``eval_path`` if None (``image_root`` without that).
        val_rows: Rows for the validation loss; 0 leaves their loader out in the contrastive stage, which has another.
        num_workers: Loader processes; 0 loads in the main process.
        seed: Seed of order and draws.
        split_seed: Seed of what is held out of files, and of what ``task_mix`` and ``limit`` leave.

    Raises:
        InputError: An argument is out of range, or is of no use with this path or stage.
    """

    def __init__(
        self,
        path: str = "scenes",
        stage: TrainStage = "contrastive",
        batch_size: int = 32,
        eval_batch_size: int = 64,
        task_mix: dict[str, float] | None = None,
        one_task_batches: bool = False,
        limit: float = 1.0,
        scenes: SceneConfig = DEFAULT_SCENES,
        split: Literal["original", "diverse_instruction"] = "original",
        rows_per_task: int | None = None,
        image_root: str | None = None,
        eval_path: str | None = None,
        eval_image_root: str | None = None,
        val_rows: int = 256,
        num_workers: int = 0,
        seed: int = 0,
        split_seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1), ("eval_batch_size", eval_batch_size, 1),
            ("val_rows", val_rows, 0 if stage == "contrastive" else 1),
            ("num_workers", num_workers, 0), ("rows_per_task", 2 if rows_per_task is None else rows_per_task, 2),
        ):  # fmt: skip
            if value < least:
                raise InputError(f"must be at least {least}, got {value}", field=name)
        if stage not in _MAKE:
            raise InputError(f"must be one of {', '.join(_MAKE)}, got '{stage}'", field="stage")
        if not 0 < limit <= 1:
            raise InputError(f"must be a share above 0, at most 1, got {limit}", field="limit")
        if task_mix is not None and (not task_mix or min(task_mix.values()) <= 0):
            raise InputError(f"needs a weight above 0 for each task to use, got {task_mix}", field="task_mix")
        if stage != "contrastive":
            for name, used in (
                ("task_mix", task_mix is not None), ("limit", limit < 1), ("one_task_batches", one_task_batches),
            ):  # fmt: skip
                if used:
                    raise InputError(f"belongs to the contrastive stage, not to '{stage}'", field=name)
        if path == "scenes":
            for name, given in (
                ("rows_per_task", rows_per_task), ("image_root", image_root),
                ("eval_path", eval_path), ("eval_image_root", eval_image_root),
            ):  # fmt: skip
                if given is not None:
                    raise InputError("is for files, not for the built-in scenes", field=name)
        elif not Path(path).exists():
            raise InputError("no such file or folder, and not 'scenes'", path)
        self.path, self.stage, self.scenes = path, stage, scenes
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.task_mix, self.one_task_batches, self.limit = task_mix, one_task_batches, limit
        self.val_rows, self.num_workers, self.seed, self.split_seed = val_rows, num_workers, seed, split_seed
        tasks = None if task_mix is None else list(task_mix)
        self.source: MultimodalSource = SceneSource(scenes) if path == "scenes" else FileSource(
            path, split, image_root, tasks, rows_per_task, eval_path, eval_image_root, split_seed
        )  # fmt: skip
        self.train_rows: dict[str, Sequence[Any]] = {}  # by task where there are several
        self._evaluation: dict[Stage, list[ChoiceTask]] = {}
        self._items: dict[Stage, list[EncodeRow]] = {}

    def setup(self, stage: str) -> None:
        """Read what a stage (``fit``, ``validate``, ``test`` or ``predict``) needs; repeated calls cost nothing.

        Raises:
            InputError: Something is missing or broken in the data; the error names file, line and field.
        """
        if stage == "fit" and not self.train_rows:
            self.train_rows = self._mixed(self._rows("train"))
        if stage in ("test", "predict"):
            if stage == "predict" or self._is_tested:
                self.evaluation("test")
        elif self.stage == "contrastive":
            self.evaluation("validate")

    def evaluation(self, stage: Stage) -> list[ChoiceTask]:
        """Return the tasks of a stage: queries, each with its candidates, the right one first."""
        if stage not in self._evaluation:
            self._evaluation[stage] = self.source.evaluation(stage)
        return self._evaluation[stage]

    def items(self, stage: Stage) -> list[EncodeRow]:
        """Return every query and every candidate of a stage once, in the order that its loader numbers them."""
        if stage not in self._items:
            self._items[stage] = encode_rows(self.evaluation(stage))
        return self._items[stage]

    def train_dataloader(self) -> ResumableLoader:
        rows = list(self.train_rows.values())
        collate = self._module.multimodal_collator(self.stage, train=True)
        sampler = self._sampler(rows, train=True)
        return ResumableLoader(KeyedRows(rows, _MAKE[self.stage]), sampler, collate, self.num_workers)

    def val_dataloader(self) -> list[DataLoader[Any]]:
        loaders = [self._item_loader("validate")] if self.stage == "contrastive" else []
        return [*loaders, self._row_loader()] if self.val_rows else loaders

    def test_dataloader(self) -> list[DataLoader[Any]]:
        if not self._is_tested:
            rank_zero_info(f"stage {self.stage} is not tested: there is no eval_path")
            warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # as has been said
            return []
        return [self._item_loader("test")]

    def predict_dataloader(self) -> list[DataLoader[Any]]:
        return whole_prediction([self._item_loader("test")])

    @property
    def _module(self) -> MultimodalCollating:
        if self.trainer is None:
            raise ValueError("loaders need a trainer: its module makes tokens and pixels")
        return cast(MultimodalCollating, self.trainer.lightning_module)

    @property
    def _is_tested(self) -> bool:
        """The stages before the contrastive one may do without evaluation rows."""
        return self.stage == "contrastive" or self.source.has_tests

    def _rows(self, part: Part) -> dict[str, Sequence[Any]]:
        """Rows of the present stage, by task where batches may be of one."""
        if self.stage == "warmup":
            return {"captions": self.source.captions(part)}
        if self.stage == "contrastive":
            return dict(self.source.pairs(part))
        targets = self.source.targets(part)
        left_out = targets.image_targets + targets.empty_targets
        if left_out and part == "train":
            rank_zero_info(
                f"{self.path}: {left_out} pairs have no text to reconstruct ({targets.image_targets} images, "
                f"{targets.empty_targets} empty), {len(targets.pairs)} are left"
            )
        return {"targets": targets.pairs}

    def _mixed(self, rows: Mapping[str, Sequence[Any]]) -> dict[str, Sequence[Any]]:
        """The share of each task that ``task_mix`` and ``limit`` leave, drawn so that a smaller one is part of it."""
        weights = dict.fromkeys(rows, 1.0) if self.task_mix is None else self.task_mix
        for task in weights:
            if task not in rows:
                raise InputError(f"no task '{task}', only {', '.join(rows)}", field="task_mix")
        scale = min(len(rows[task]) / weight for task, weight in weights.items())
        kept: dict[str, Sequence[Any]] = {}
        for task, weight in weights.items():
            count = len(rows[task]) if self.task_mix is None else round(scale * weight)
            order = list(range(len(rows[task])))
            random.Random(f"{self.split_seed}/{task}").shuffle(order)
            kept[task] = [rows[task][row] for row in sorted(order[: max(1, round(count * self.limit))])]
        return kept

    def _sampler(self, rows: Sequence[Sequence[Any]], train: bool) -> ResumableBatchSampler:
        place = (self.seed if train else self.split_seed, self._rank, self._world_size)
        if self.stage == "contrastive":
            numbers: dict[Key, int] = {}
            labels = [[numbers.setdefault(pair.positive.key, len(numbers)) for pair in pairs] for pairs in rows]
            return DistinctBatchSampler(labels, self.batch_size, *place, mixed=not self.one_task_batches)
        sizes = [len(of) for of in rows]
        whole = (
            train and min(sizes) >= self.batch_size * self._world_size
        )  # a set too small for a batch is not left out
        return HomogeneousBatchSampler(sizes, self.batch_size, *place, drop_last=whole, shuffle=train)

    def _row_loader(self) -> DataLoader[Any]:
        """Return validation rows: the same ones, with the same seeds, every time."""
        rows = [row for of in self._rows("validate").values() for row in of]
        chosen = [rows[number] for number in sorted(permutation(len(rows), self.split_seed, 7)[: self.val_rows])]
        collate = self._module.multimodal_collator(self.stage, train=False)
        dataset = KeyedRows([chosen], _MAKE[self.stage])
        return plain_loader(dataset, self._sampler([chosen], train=False), collate, self.num_workers)

    def _item_loader(self, stage: Stage) -> DataLoader[Any]:
        items = self.items(stage)  # like ones stand together, so batches are padded little
        sampler = LengthSortedBatchSampler([1] * len(items), self.eval_batch_size, self._rank, self._world_size)
        return plain_loader(ItemRows(items), sampler, self._module.item_collator(), self.num_workers)
