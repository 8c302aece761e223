"""Where multimodal training rows and evaluation tasks come from: the built-in scenes, or files in MMEB's layout."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Protocol, TypeVar

from lit_core.errors import InputError
from lit_core.samplers import permutation
from lit_embed.data import scenes
from lit_embed.data.mmeb import (
    Targets,
    holds_evaluation,
    read_captions,
    read_evaluation,
    read_targets,
    read_training,
    reconstruction_pairs,
    set_of,
)
from lit_embed.data.scenes import SceneConfig, build_scenes
from lit_embed.items import Item
from lit_embed.multimodal import ChoiceTask, ItemPair, choice_task

Part = Literal["train", "validate"]
Stage = Literal["validate", "test"]
Row = TypeVar("Row")

HELD_OUT = (0.05, 200)  # share and most of a file's rows (of a task's, where there are tasks) for validation


class MultimodalSource(Protocol):
    """Something to train and evaluate on; everything is a function of its arguments, the same on all ranks."""

    def captions(self, part: Part) -> list[Item]:
        """Images with their captions as texts."""
        ...

    def targets(self, part: Part) -> Targets:
        """Queries with the texts to reconstruct from them."""
        ...

    def pairs(self, part: Part) -> dict[str, list[ItemPair]]:
        """Queries and what answers them, by task."""
        ...

    def evaluation(self, stage: Stage) -> list[ChoiceTask]:
        """Queries with candidates."""
        ...

    @property
    def has_tests(self) -> bool:
        """Whether there is an evaluation for testing."""
        ...


@dataclass(frozen=True)
class SceneSource:
    """The built-in scenes."""

    config: SceneConfig
    has_tests = True

    def captions(self, part: Part) -> list[Item]:
        return scenes.caption_items(build_scenes(self.config), part)

    def targets(self, part: Part) -> Targets:
        """The pairs of the tasks, and further captions of each picture."""
        found = reconstruction_pairs(pair for pairs in self.pairs(part).values() for pair in pairs)
        return found._replace(pairs=[*found.pairs, *scenes.further_captions(build_scenes(self.config), part)])

    def pairs(self, part: Part) -> dict[str, list[ItemPair]]:
        return scenes.training_pairs(build_scenes(self.config), part)

    def evaluation(self, stage: Stage) -> list[ChoiceTask]:
        return scenes.evaluation_tasks(build_scenes(self.config), stage)


@dataclass(frozen=True)
class FileSource:
    """Files in the layouts of ``lit_embed.data.mmeb``; see ``MultimodalDataModule`` for the meaning of the fields.

    5 % of the rows (of each task), at most 200, are held out for validation. Their queries then have the other
    positives held out of the task as candidates: the evaluation files are for testing alone.
    """

    path: str
    split: str = "original"
    image_root: str | None = None
    tasks: Sequence[str] | None = None
    rows_per_task: int | None = None
    eval_path: str | None = None
    eval_image_root: str | None = None
    seed: int = 0

    def captions(self, part: Part) -> list[Item]:
        return self._part(part, self._captions)

    def targets(self, part: Part) -> Targets:
        return self._targets._replace(pairs=self._part(part, self._targets.pairs))

    def pairs(self, part: Part) -> dict[str, list[ItemPair]]:
        return {task: self._part(part, pairs) for task, pairs in self._pairs.items()}

    def evaluation(self, stage: Stage) -> list[ChoiceTask]:
        if stage == "test":
            if not self.has_tests:
                raise InputError("testing needs a folder of evaluation rows", field="eval_path")
            if self.eval_path is None:
                return read_evaluation(self.path, image_root=self.eval_image_root or self.image_root)
            return read_evaluation(self.eval_path, image_root=self.eval_image_root)
        return [held_out_task(task, pairs) for task, pairs in self.pairs("validate").items()]

    @cached_property
    def has_tests(self) -> bool:
        return self.eval_path is not None or holds_evaluation(self.path)

    @cached_property
    def _captions(self) -> list[Item]:
        return read_captions(self.path, self.image_root, self.rows_per_task)

    @cached_property
    def _targets(self) -> Targets:
        found = read_targets(self.path, self.split, self.image_root, self.tasks, self.rows_per_task)
        if not found.pairs:
            raise InputError(
                f"no text to reconstruct: {found.image_targets} targets are images, {found.empty_targets} are empty",
                self.path,
            )
        return found

    @cached_property
    def _pairs(self) -> dict[str, list[ItemPair]]:
        return read_training(self.path, self.split, self.image_root, self.tasks, self.rows_per_task)

    def _part(self, part: Part, rows: list[Row]) -> list[Row]:
        if len(rows) < 2:
            raise InputError(f"{len(rows)} rows are too few to train and validate on; need at least 2", self.path)
        share, most = HELD_OUT
        held_out = set(permutation(len(rows), self.seed, 6)[: min(most, max(1, int(share * len(rows))))])
        return [row for number, row in enumerate(rows) if (number in held_out) == (part == "validate")]


def held_out_task(task: str, pairs: Sequence[ItemPair]) -> ChoiceTask:
    """Make a task of training pairs: each query chooses among the positives of all of them, its own first."""
    group, domain = set_of(task)
    positives = [pair.positive for pair in pairs]
    return choice_task(task, group, domain, [(pair.query, [pair.positive, *positives]) for pair in pairs])
