"""MMEB's layout: training rows, evaluation rows with lists of candidates, and the sets it consists of.

A folder has a subfolder or a file for each task. A file in a subfolder is named by its split, perhaps in numbered
parts: ``OK-VQA/original-00000-of-00001.parquet``, ``OK-VQA/test.jsonl``. Rows name images relative to a root.

- training: ``qry, qry_image_path, pos_text, pos_image_path, [neg_text, neg_image_path]``
- evaluation: ``qry_text, qry_img_path, tgt_text, tgt_img_path``; the last two are lists whose first entries are right
- captions: ``image_path, caption``
- targets to reconstruct: ``qry, qry_image_path, pos_text, [pos_image_path]``
"""

import re
from collections.abc import Collection, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lit_core.errors import InputError
from lit_embed.data.image_rows import SUFFIXES, ImageFolder, Row, read_rows
from lit_embed.items import MARKER, Item
from lit_embed.multimodal import ChoiceTask, Domain, Group, ItemPair, TargetPair

SETS: dict[tuple[Group, Domain], tuple[str, ...]] = {  # of MMEB-V1; those in domain are in MMEB-train too
    ("classification", "ind"): ("ImageNet-1K", "N24News", "HatefulMemes", "VOC2007", "SUN397"),
    ("classification", "ood"): ("Place365", "ImageNet-A", "ImageNet-R", "ObjectNet", "Country211"),
    ("vqa", "ind"): ("OK-VQA", "A-OKVQA", "DocVQA", "InfographicsVQA", "ChartQA", "Visual7W"),
    ("vqa", "ood"): ("ScienceQA", "VizWiz", "GQA", "TextVQA"),
    ("retrieval", "ind"): (
        "VisDial", "CIRR", "VisualNews_t2i", "VisualNews_i2t", "MSCOCO_t2i", "MSCOCO_i2t", "NIGHTS", "WebQA",
    ),
    ("retrieval", "ood"): ("FashionIQ", "Wiki-SS-NQ", "OVEN", "EDIS"),
    ("grounding", "ind"): ("MSCOCO",),
    ("grounding", "ood"): ("RefCOCO", "RefCOCO-Matching", "Visual7W-Pointing"),
}  # fmt: skip


class Targets(NamedTuple):
    """Pairs whose target is a text, and how many others were left out."""

    pairs: list[TargetPair]
    image_targets: int
    empty_targets: int


def set_of(name: str) -> tuple[Group, Domain | None]:
    """Group and domain of one of the 36 sets, hyphens and underscores alike; ``other`` and None for any other name."""
    return _PLACES.get(_plain(name), ("other", None))


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


_PLACES = {_plain(name): place for place, names in SETS.items() for name in names}


def read_training(
    path: Path | str,
    split: str = "original",
    image_root: Path | str | None = None,
    tasks: Collection[str] | None = None,
    limit: int | None = None,
) -> dict[str, list[ItemPair]]:
    """Read training rows as pairs, by task.

    Args:
        path: A folder in MMEB's layout, the folder of one task, or a file.
        split: ``original`` or ``diverse_instruction``, for files that are named by their split.
        image_root: What images are relative to; the folder itself, or the file's, if None.
        tasks: Names of the tasks to read; all of them if None.
        limit: Read this many rows of each task at most.

    Raises:
        InputError: There is no such file, task or split, or a row is broken; the error names file, line and field.
    """
    pairs: dict[str, list[ItemPair]] = {}
    for task, row in _rows(path, split, image_root, tasks, limit):
        query, positive = row.item("qry", "qry_image_path"), row.item("pos_text", "pos_image_path")
        pairs.setdefault(task, []).append(ItemPair(query, positive, task, _negative(row)))
    return pairs


def _negative(row: Row) -> Item | None:
    text, image = (row.text(field) if field in row.values else "" for field in ("neg_text", "neg_image_path"))
    return row.make_item(text, image, "neg_text", "neg_image_path") if text or image else None


def read_targets(
    path: Path | str,
    split: str = "original",
    image_root: Path | str | None = None,
    tasks: Collection[str] | None = None,
    limit: int | None = None,
) -> Targets:
    """Read training rows, or a JSON list of ``qry``, ``qry_image_path`` and ``pos_text``, as texts to reconstruct.

    Rows whose target is an image, or empty, are counted and left out. Arguments and errors as in ``read_training``.
    """
    found = Targets([], 0, 0)
    images = empty = 0
    for task, row in _rows(path, split, image_root, tasks, limit):
        target = row.text("pos_text")
        if "pos_image_path" in row.values and row.text("pos_image_path"):
            images += 1
        elif not target:
            empty += 1
        elif MARKER in target:
            raise row.error(f"has {MARKER} in its text, but no image", "pos_text")
        else:
            found.pairs.append(TargetPair(row.item("qry", "qry_image_path"), target, task))
    return Targets(found.pairs, images, empty)


def reconstruction_pairs(pairs: Iterable[ItemPair]) -> Targets:
    """Pairs as texts to reconstruct; those whose positive has an image or only white space are counted and left out."""
    found: list[TargetPair] = []
    images = empty = 0
    for pair in pairs:
        if pair.positive.image is not None:
            images += 1
        elif not pair.positive.text.strip():
            empty += 1
        else:
            found.append(TargetPair(pair.query, pair.positive.text, pair.task))
    return Targets(found, images, empty)


def read_captions(path: Path | str, image_root: Path | str | None = None, limit: int | None = None) -> list[Item]:
    """Read a file of ``image_path`` and ``caption`` as images with their captions as texts.

    Args:
        path: The file, or a folder of such files.
        image_root: What images are relative to; the folder itself, or the file's, if None.
        limit: Read this many rows at most.

    Raises:
        InputError: The file is missing, empty or broken, or a row lacks a caption or an image.
    """
    if Path(path).is_dir() and not _data_files(Path(path)):
        raise InputError("no file of captions in it (rows of image_path and caption)", path)
    items = []
    for _, row in _rows(path, "", image_root, None, limit):
        for field in ("caption", "image_path"):
            if not row.text(field):
                raise row.error("is empty", field)
        items.append(row.item("caption", "image_path"))
    return items


def read_evaluation(
    path: Path | str,
    split: str = "test",
    image_root: Path | str | None = None,
    tasks: Collection[str] | None = None,
    limit: int | None = None,
) -> list[ChoiceTask]:
    """Read evaluation rows, a task of each set; arguments and errors as in ``read_training``.

    Where ``tgt_text`` or ``tgt_img_path`` is one string, all candidates have it. A candidate that comes twice in a
    list counts once.
    """
    by_task: dict[str, _Choices] = {}
    for task, row in _rows(path, split, image_root, tasks, limit):
        by_task.setdefault(task, _Choices()).add(row)
    return [
        ChoiceTask(task, *set_of(task), found.queries, found.targets, found.candidates)
        for task, found in by_task.items()
    ]


def holds_evaluation(path: Path | str, split: str = "test") -> bool:
    """Whether the first row found at a path, if there is any, is one of evaluation.

    Raises:
        InputError: The first file is broken.
    """
    try:
        files, root = _files(Path(path), split, None)
    except InputError:
        return False
    row = next(read_rows(next(iter(files.values()))[0], ImageFolder(root)), None)
    return row is not None and "qry_text" in row.values


class _Choices:
    """The queries and candidates of one task; candidates are known by their fields, as most come many times."""

    def __init__(self) -> None:
        self.queries: list[Item] = []
        self.targets: list[Item] = []
        self.candidates: list[NDArray[np.int32]] = []
        self._rows: dict[tuple[str, str], int] = {}

    def add(self, row: Row) -> None:
        texts, images = _strings(row, "tgt_text"), _strings(row, "tgt_img_path")
        if isinstance(texts, str) and isinstance(images, str):
            texts = [texts]
        count = len(images if isinstance(texts, str) else texts)
        texts = [texts] * count if isinstance(texts, str) else texts
        images = [images] * count if isinstance(images, str) else images
        if len(images) != count:
            raise row.error(f"needs an entry for each of the {count} of tgt_text, got {len(images)}", "tgt_img_path")
        if not count:
            raise row.error("has no candidate", "tgt_text")
        self.queries.append(row.item("qry_text", "qry_img_path"))
        pairs = zip(map(str.strip, texts), map(str.strip, images), strict=True)
        numbers = [self._number(row, place, text, image) for place, (text, image) in enumerate(pairs, start=1)]
        self.candidates.append(np.array(list(dict.fromkeys(numbers)), dtype=np.int32))

    def _number(self, row: Row, place: int, text: str, image: str) -> int:
        number = self._rows.get((text, image))
        if number is None:
            item = row.make_item(text, image, "tgt_text", "tgt_img_path", f"candidate {place}: ")
            number = self._rows[text, image] = len(self.targets)
            self.targets.append(item)
        return number


def _strings(row: Row, field: str) -> str | list[str]:
    value = row.values.get(field)
    if isinstance(value, list):
        for entry in value:
            if not isinstance(entry, str | None):
                raise row.error(f"must be a list of strings, has an entry of type {type(entry).__name__}", field)
        return [entry or "" for entry in value]
    if field in row.values and not isinstance(value, str | None):
        raise row.error(f"must be a list of strings, got {type(value).__name__}", field)
    return row.text(field)


def _rows(
    path: Path | str, split: str, image_root: Path | str | None, tasks: Collection[str] | None, limit: int | None
) -> Iterator[tuple[str, Row]]:
    """Every row with its task, task by task.

    Raises:
        InputError: Nothing is found, or a task is missing or has no rows.
    """
    path = Path(path)
    files, root = _files(path, split, tasks)
    for name in tasks or ():
        if name not in files:
            raise InputError(f"no task '{name}', only {', '.join(files)}", path)
    images = ImageFolder(root if image_root is None else image_root)
    for task in files if tasks is None else [task for task in files if task in tasks]:
        rows = (row for part in files[task] for row in read_rows(part, images))
        first = next(rows, None)
        if first is None:
            raise InputError("has no rows", files[task][0])
        yield task, first
        yield from ((task, row) for row in islice(rows, None if limit is None else limit - 1))


def _files(path: Path, split: str, tasks: Collection[str] | None) -> tuple[dict[str, list[Path]], Path]:
    """Data files of each task, and the folder that images are relative to if nobody says."""
    if path.is_file():
        return {path.stem: [path]}, path.parent
    if not path.is_dir():
        raise InputError("no such file or folder", path)
    own = _data_files(path)
    if parts := [file for file in own if _split_of(file) == split]:
        return {path.name: parts}, path.parent
    files = {file.stem: [file] for file in own}  # a task in a file of its name has no splits
    for folder in sorted(entry for entry in path.iterdir() if entry.is_dir()):
        every = _data_files(folder)
        parts = [file for file in every if _split_of(file) == split]
        if parts:
            files[folder.name] = parts
        elif every and (tasks is None or folder.name in tasks):
            others = ", ".join(sorted({_split_of(file) for file in every}))
            raise InputError(f"no split '{split}', only {others}", folder)
    if not files:
        raise InputError(f"no task in it; it needs <task>/{split}.jsonl (or .parquet, in parts or not)", path)
    return files, path


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES and file.is_file())


def _split_of(file: Path) -> str:
    """The split in a file's name: of ``test-00000-of-00001.parquet`` and of ``test.jsonl`` it is ``test``."""
    return re.sub(r"-\d+(-of-\d+)?$", "", file.stem)
