import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import Tensor

from lit_core.errors import InputError
from lit_embed.data.multimodal_datamodule import MultimodalDataModule
from lit_embed.data.scenes import TASKS, SceneConfig, SceneImage
from lit_embed.items import ImageFile
from lit_embed.multimodal import ContrastiveRow, EncodeRow, ReconstructionRow, TrainStage, WarmupRow
from lit_embed.retrieval.precision import evaluate_precision

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),  # lightning 2.6 on torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # advice only
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from datasets and what it imports
]

SCENES = SceneConfig(train_scenes=60, eval_scenes=12, candidates=8)


class Batch:
    """Keeps rows as they are: lightning would look for tensors in them."""

    def __init__(self, rows: list[Any], what: tuple[Any, ...]) -> None:
        self.rows, self.what = rows, what

    def to(self, device: Any, non_blocking: bool = False) -> "Batch":
        return self


class Recorder(LightningModule):
    """Records what it is given, without tokens and pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.train_rows, self.val_rows = list[list[Any]](), list[list[Any]]()
        self.encoded: list[EncodeRow] = []
        self.asked = list[tuple[Any, ...]]()

    def multimodal_collator(self, stage: TrainStage, train: bool) -> Callable[[list[Any]], Any]:
        self.asked.append((stage, train))
        return lambda rows: Batch(rows, (stage, train))

    def item_collator(self) -> Callable[[list[EncodeRow]], Any]:
        return lambda rows: Batch(rows, ("items",))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        assert batch.what[1] is True
        self.train_rows.append(batch.rows)
        return self.layer(torch.ones(1, 1)).sum()

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if batch.what == ("items",):
            assert dataloader_idx == 0
            self.encoded += batch.rows
        else:
            assert batch.what[1] is False
            self.val_rows.append(batch.rows)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.encoded += batch.rows

    def predict_step(self, batch: Batch, batch_idx: int) -> int:
        return len(batch.rows)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(**options: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", devices=1, logger=False, enable_progress_bar=False, enable_model_summary=False,
        use_distributed_sampler=False, num_sanity_val_steps=0, **{"enable_checkpointing": False, **options},
    )  # fmt: skip


def fit(data: MultimodalDataModule, **options: Any) -> Recorder:
    module = Recorder()
    trainer(**{"max_epochs": 1, **options}).fit(module, data)
    return module


def test_the_warm_up_has_pictures_with_captions() -> None:
    data = MultimodalDataModule(stage="warmup", scenes=SCENES, batch_size=16, val_rows=10)
    module = fit(data, max_epochs=2)
    assert module.asked == [("warmup", False), ("warmup", True)] or module.asked == [
        ("warmup", True),
        ("warmup", False),
    ]
    assert [len(rows) for rows in module.train_rows] == [16] * 14  # 120 captions, twice
    rows = [row for batch in module.train_rows for row in batch]
    assert all(isinstance(row, WarmupRow) and isinstance(row.item.image, SceneImage) for row in rows)
    assert len({row.seed for row in rows}) == len(rows)  # other masks in the second epoch
    assert len({row.item.key for row in rows[:112]}) == 112
    assert [len(rows) for rows in module.val_rows] == [10, 10]
    assert module.val_rows[0] == module.val_rows[1]
    trained = {row.item.image.key for row in rows}
    assert not trained & {row.item.image.key for row in module.val_rows[0]}


def test_reconstruction_has_texts_as_targets(caplog: pytest.LogCaptureFixture) -> None:
    data = MultimodalDataModule(stage="reconstruction", scenes=SCENES, batch_size=16, val_rows=5)
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = fit(data)
    rows = [row for batch in module.train_rows for row in batch]
    assert len(rows) == 240  # classes, answers, two captions
    assert Counter(row.task for row in rows) == {"classification": 60, "vqa": 60, "retrieval_i2t": 120}
    assert all(isinstance(row, ReconstructionRow) and row.query.image is not None and row.target for row in rows)
    assert "180 pairs have no text to reconstruct (180 images, 0 empty), 240 are left" in caplog.text
    assert [len(rows) for rows in module.val_rows] == [5]


def test_contrastive_batches_and_evaluation() -> None:
    data = MultimodalDataModule(scenes=SCENES, batch_size=20, eval_batch_size=50, val_rows=40)
    module = fit(data)
    assert [len(rows) for rows in module.train_rows] == [20] * 18
    rows = [row for batch in module.train_rows for row in batch]
    assert all(isinstance(row, ContrastiveRow) and row.negative is None for row in rows)
    assert Counter(row.task for row in rows) == dict.fromkeys(TASKS, 60)
    assert sum(len({row.task for row in batch}) > 1 for batch in module.train_rows) == 18
    frequent = Counter(row.positive.key for row in rows)
    assert frequent.most_common(1)[0][1] <= 18
    assert all(len({row.positive.key for row in batch}) == 20 for batch in module.train_rows)
    assert [len(rows) for rows in module.val_rows] == [20, 20]
    items = data.items("validate")
    assert sorted(row.number for row in module.encoded) == list(range(len(items)))
    assert all(items[row.number] == row for row in module.encoded)
    tested = Recorder()
    trainer().test(tested, data, verbose=False)
    assert len(data.evaluation("test")) == 12
    assert {row.item.key for row in tested.encoded} == {
        item.key for task in data.evaluation("test") for item in task.items()
    }
    assert len(tested.encoded) == len(data.items("test"))
    assert not {row.item.key for row in tested.encoded if row.item.image} <= {row.item.key for row in module.encoded}
    predicted = trainer().predict(tested, data)
    assert predicted is not None
    assert sum(predicted) == len(data.items("test"))  # type: ignore[arg-type]


def test_a_perfect_and_a_blind_encoder() -> None:
    """What the loaders number is what the tasks look up: an encoder that knows the answers has full marks."""
    data = MultimodalDataModule(scenes=SCENES)
    data.setup("test")
    module = Recorder()
    trainer().test(module, data, verbose=False)
    tasks, items = data.evaluation("test"), data.items("test")
    blind = {items[row.number].item.key: torch.ones(4) for row in module.encoded}
    assert evaluate_precision(blind, tasks).metrics()["p@1"] == 0
    assert evaluate_precision(blind, tasks, "random").metrics()["p@1"] == pytest.approx(1 / 8)
    places = {row.item.key: torch.eye(len(items))[row.number] for row in items}
    for task in tasks:
        vectors = dict(places)
        for query, rows in zip(task.queries, task.candidates, strict=True):
            vectors[query.key] = places[task.targets[rows[0]].key]
        assert evaluate_precision(vectors, [task]).metrics()["p@1"] == 1


def test_batches_of_one_task_and_a_mix() -> None:
    mix = {"vqa": 2.0, "grounding": 1.0}
    module = fit(MultimodalDataModule(scenes=SCENES, batch_size=10, task_mix=mix, one_task_batches=True, val_rows=0))
    assert [{row.task for row in batch} for batch in module.train_rows].count({"vqa"}) == 6
    assert [{row.task for row in batch} for batch in module.train_rows].count({"grounding"}) == 3
    assert len(module.train_rows) == 9
    data = MultimodalDataModule(scenes=SCENES, task_mix=mix)
    data.setup("fit")
    assert {task: len(rows) for task, rows in data.train_rows.items()} == {"vqa": 60, "grounding": 30}


def test_a_smaller_limit_is_part_of_a_larger_one() -> None:
    kept = []
    for limit in (0.1, 0.5):
        for seed in (0, 1):
            data = MultimodalDataModule(scenes=SCENES, limit=limit, seed=seed)
            data.setup("fit")
            kept.append({task: [pair.query.key for pair in rows] for task, rows in data.train_rows.items()})
    assert kept[0] == kept[1]
    assert kept[2] == kept[3]
    for task in TASKS:
        assert (len(kept[0][task]), len(kept[2][task])) == (6, 30)
        assert set(kept[0][task]) <= set(kept[2][task])
    other = MultimodalDataModule(scenes=SCENES, limit=0.1, split_seed=1)
    other.setup("fit")
    assert [pair.query.key for pair in other.train_rows["vqa"]] != kept[0]["vqa"]


def seen(rows: list[list[Any]]) -> list[list[tuple[Any, int]]]:
    return [[(row.query.key, row.seed) for row in batch] for batch in rows]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_resuming_sees_the_same_batches(tmp_path: Path, workers: int) -> None:
    options: dict[str, Any] = {"scenes": SCENES, "batch_size": 20, "val_rows": 0, "num_workers": workers}
    keep = [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1, save_on_train_epoch_end=False)]
    limits: dict[str, Any] = {"max_epochs": 2, "limit_val_batches": 0, "enable_checkpointing": True, "callbacks": keep}
    whole = fit(MultimodalDataModule(**options), **limits)  # an epoch has 18 steps
    for step in (5, 20):
        rest = Recorder()
        path = tmp_path / f"step={step}.ckpt"
        trainer(**limits).fit(rest, MultimodalDataModule(**options), ckpt_path=path, weights_only=True)
        assert seen(rest.train_rows) == seen(whole.train_rows)[step:]


def test_ranks_share_out_rows_and_items() -> None:
    train, encoded = [], []
    for rank in (0, 1):
        data = MultimodalDataModule(scenes=SCENES, batch_size=10, eval_batch_size=16, val_rows=0)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2, lightning_module=Recorder())  # type: ignore[assignment]
        data.setup("fit")
        train.append([batch.rows for batch in data.train_dataloader()])
        (loader,) = data.val_dataloader()
        encoded.append([row.number for batch in loader for row in batch.rows])
    assert [len(batches) for batches in train] == [18, 18]
    for mine, others in zip(*train, strict=True):
        assert len({row.positive.key for row in [*mine, *others]}) == 20  # of all ranks together
    assert len({row.seed for batches in train for batch in batches for row in batch}) == 360
    assert {*encoded[0], *encoded[1]} == set(range(len(data.items("validate"))))
    assert len(encoded[0]) + len(encoded[1]) <= len(data.items("validate")) + 1


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty pictures in MMEB's layout, two tasks to train on and one to test on."""
    (tmp_path / "images").mkdir()
    train, evaluation = [], []
    for number in range(20):
        Image.new("RGB", (4, 4), (number, 0, 0)).save(tmp_path / "images" / f"{number}.png")
        ask = {"qry": "<|image_1|>\nName it.", "qry_image_path": f"images/{number}.png"}
        train.append(ask | {"pos_text": f"red {number}", "pos_image_path": ""})
        evaluation.append({"qry_text": ask["qry"], "qry_img_path": ask["qry_image_path"],
                           "tgt_text": [f"red {number}", "blue"], "tgt_img_path": ["", ""]})  # fmt: skip
    find = {"qry": "find it", "qry_image_path": "", "pos_text": "", "pos_image_path": "images/1.png",
            "neg_text": "", "neg_image_path": "images/2.png"}  # fmt: skip
    for place, rows in (("train/VOC2007", train), ("train/NIGHTS", [find | {"qry": f"find {i}"} for i in range(10)])):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "original.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "ObjectNet.jsonl").write_text("\n".join(map(json.dumps, evaluation)))
    captions = [{"image_path": f"images/{i}.png", "caption": f"red {i}"} for i in range(20)]
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    return tmp_path


def test_a_folder_in_the_layout_of_mmeb(folder: Path) -> None:
    root = str(folder)
    data = MultimodalDataModule(
        str(folder / "train"),
        image_root=root,
        eval_path=str(folder / "eval"),
        eval_image_root=root,
        batch_size=4,
        val_rows=2,
    )
    module = fit(data)
    rows = [row for batch in module.train_rows for row in batch]
    assert len(rows) == 28  # one of 20 and one of 10 are held out
    assert {row.negative.image for row in rows if row.negative} == {ImageFile(folder / "images/2.png")}
    validation = data.evaluation("validate")
    assert [(task.name, task.group, task.domain, len(task.queries)) for task in validation] == [
        ("NIGHTS", "retrieval", "ind", 1), ("VOC2007", "classification", "ind", 1),
    ]  # fmt: skip
    assert not {row.query.key for row in rows} & {query.key for task in validation for query in task.queries}
    tested = Recorder()
    trainer().test(tested, data, verbose=False)
    assert len(tested.encoded) == 20 + 21
    (task,) = data.evaluation("test")
    assert (task.name, task.domain) == ("ObjectNet", "ood")
    mixed = MultimodalDataModule(str(folder / "train"), image_root=root, task_mix={"VOC2007": 1}, rows_per_task=10)
    mixed.setup("fit")
    assert {task: len(rows) for task, rows in mixed.train_rows.items()} == {"VOC2007": 9}


def test_files_of_the_first_two_stages(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = fit(MultimodalDataModule(str(folder / "captions.json"), "warmup", batch_size=4, val_rows=2))
    assert sum(map(len, module.train_rows)) == 16  # 19, in fours
    assert [len(rows) for rows in module.val_rows] == [1]
    with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
        module = fit(
            MultimodalDataModule(str(folder / "train"), "reconstruction", image_root=str(folder), batch_size=4)
        )
    assert {row.task for batch in module.train_rows for row in batch} == {"VOC2007"}
    assert "10 pairs have no text to reconstruct (10 images, 0 empty)" in caplog.text
    images = str(folder / "train" / "NIGHTS")
    with pytest.raises(InputError, match="no text to reconstruct: 10 targets are images, 0 are empty"):
        MultimodalDataModule(images, "reconstruction", image_root=str(folder)).setup("fit")


def test_the_first_two_stages_need_no_evaluation_rows(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    for path, stage in (("captions.json", "warmup"), ("train/VOC2007", "reconstruction")):
        data = MultimodalDataModule(str(folder / path), stage, image_root=str(folder), batch_size=4)  # type: ignore[arg-type]
        data.setup("test")  # as a fit does before it begins
        tested = Recorder()
        with caplog.at_level("INFO", "lightning.pytorch.utilities.rank_zero"):
            trainer().test(tested, data, verbose=False)
        assert tested.encoded == []
        assert f"stage {stage} is not tested: there is no eval_path" in caplog.text
        with pytest.raises(InputError, match="field 'eval_path'"):
            data.setup("predict")


def test_evaluation_rows_are_found_by_their_path_alone(folder: Path) -> None:
    for path in ("eval", "eval/ObjectNet.jsonl"):
        data = MultimodalDataModule(str(folder / path), image_root=str(folder))
        tested = Recorder()
        trainer().test(tested, data, verbose=False)
        assert len(tested.encoded) == 20 + 21
    (folder / "eval" / "ObjectNet.jsonl").write_text("{")
    with pytest.raises(InputError, match=r"ObjectNet.jsonl:1: not valid JSON"):
        MultimodalDataModule(str(folder / "eval"), image_root=str(folder)).setup("test")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch_size": 0}, "field 'batch_size': must be at least 1, got 0"),
        ({"eval_batch_size": 0}, "field 'eval_batch_size'"),
        ({"val_rows": 0, "stage": "warmup"}, "field 'val_rows': must be at least 1, got 0"),
        ({"rows_per_task": 1}, "field 'rows_per_task': must be at least 2, got 1"),
        ({"stage": "pretraining"}, "field 'stage': must be one of warmup, reconstruction, contrastive"),
        ({"limit": 0.0}, "field 'limit': must be a share above 0, at most 1, got 0.0"),
        ({"limit": 0.5, "stage": "warmup"}, "field 'limit': belongs to the contrastive stage"),
        ({"task_mix": {"vqa": 1}, "stage": "reconstruction"}, "field 'task_mix': belongs to the contrastive stage"),
        ({"one_task_batches": True, "stage": "warmup"}, "field 'one_task_batches': belongs to"),
        ({"task_mix": {"vqa": 0.0}}, "field 'task_mix': needs a weight above 0"),
        ({"task_mix": {}}, "field 'task_mix': needs a weight above 0"),
        ({"task_mix": {"captioning": 1.0}}, "field 'task_mix': no task 'captioning', only classification, vqa"),
        ({"image_root": "x"}, "field 'image_root': is for files, not for the built-in scenes"),
        ({"path": "no/such/folder"}, "no/such/folder: no such file or folder, and not 'scenes'"),
    ],
)
def test_mistakes(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        MultimodalDataModule(**{"scenes": SCENES, **options}).setup("fit")
    assert words in str(error.value)


def test_testing_on_files_needs_evaluation_rows(folder: Path) -> None:
    data = MultimodalDataModule(str(folder / "train"), image_root=str(folder))
    with pytest.raises(InputError, match="field 'eval_path': testing needs a folder of evaluation rows"):
        data.setup("test")
    row = {"qry": "a", "qry_image_path": "", "pos_text": "b", "pos_image_path": ""}
    (folder / "train" / "VOC2007" / "original.jsonl").write_text(json.dumps(row))
    with pytest.raises(InputError, match="1 rows are too few to train and validate on"):
        MultimodalDataModule(str(folder / "train"), image_root=str(folder)).setup("fit")
    with pytest.raises(ValueError, match="loaders need a trainer"):
        MultimodalDataModule(scenes=SCENES).test_dataloader()


def test_fields_are_flags() -> None:
    parser = ArgumentParser()
    parser.add_class_arguments(MultimodalDataModule, "data")
    config = parser.parse_args(["--data.scenes.grid=3", "--data.stage=warmup", "--data.limit=1"])
    data = parser.instantiate_classes(config).data
    assert (data.scenes, data.stage) == (SceneConfig(grid=3), "warmup")
    config = parser.parse_args(["--data.task_mix={vqa: 2, grounding: 1}"])
    assert parser.instantiate_classes(config).data.task_mix == {"vqa": 2, "grounding": 1}
