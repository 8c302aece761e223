"""Models of the experiment that are made of trained ones without training: merges, averages, an ensemble."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from experiments.boom.training import BASE, DONE, EXPORT, FULL, evaluate, evaluation_cli, finish, group_models
from lit_core.files import read_json
from lit_core.merging import drift, merge_folders
from lit_core.reproduce import Arm, ArmContext
from lit_core.setting import Setting
from lit_core.stages import write_export
from lit_embed.methods.boom import score_tasks
from lit_embed.modules.encoder import build_encoder

MERGED = "merged"
LAST = 3  # checkpoints that are averaged


@dataclass(frozen=True)
class Merged:
    """A model that is merged from those of other arms.

    Args:
        name: Of the arm.
        title: In tables.
        members: Arms whose models are merged.
        cost: Of training them, where a run over all data costs 1; ``group_arm`` takes what that arm says.
        method: Of merging.
        weights: One a member; None counts them equally.
        options: Of the method.
        of_base: Whether the method is given the base.
        main: Whether it is run by default.
    """

    name: str
    title: str
    members: tuple[str, ...]
    cost: float = 1.0
    method: str = "multislerp"
    weights: tuple[float, ...] | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    of_base: bool = False
    main: bool = False


def merged_arm(setting: Setting, one: Merged, needs: tuple[str, ...]) -> Arm:
    """An arm that merges models and tests the result."""

    def run(context: ArmContext) -> None:
        models = [context.of(name) / EXPORT for name in one.members]
        _merge(setting, context, one, models)

    return Arm(one.name, one.title, run, main=one.main, needs=(*needs, *one.members))


def group_arm(setting: Setting, one: Merged, needs: tuple[str, ...]) -> Arm:
    """The same for the models that a single arm has trained, one for each set, task type or cluster."""

    def run(context: ArmContext) -> None:
        group = context.of(one.members[0])
        cost = read_json(group / "results.json")["metrics"]["cost"]
        _merge(setting, context, replace(one, cost=cost), group_models(group))

    return Arm(one.name, one.title, run, main=one.main, needs=(*needs, *one.members))


def last_checkpoints_arm(setting: Setting, needs: tuple[str, ...]) -> Arm:
    """The mean of the last checkpoints of the run over all data, the final one among them."""

    def run(context: ArmContext) -> None:
        full = context.of(FULL)
        steps = read_json(full / DONE)["steps"]
        before = sorted((path for path in (full / "fit").glob("*step=*.ckpt") if _step(path) < steps), key=_step)
        models = []
        for path in before[1 - LAST :]:
            models.append(context.folder / f"step{_step(path)}")
            if not models[-1].exists():
                write_export(setting.spec, path, models[-1], "merged")
        models.append(full / EXPORT)
        _merge(setting, context, Merged("", "", (), 1.0, "linear"), models)

    return Arm("last_checkpoints", "BLS, mean of its last checkpoints", run, main=False, needs=(*needs, FULL))


def _step(checkpoint: Path) -> int:
    return int(checkpoint.stem.rpartition("step=")[2])


def interpolated_arm(setting: Setting, share: float, needs: tuple[str, ...]) -> Arm:
    """Between the base and the run over all data: robustness without bags."""

    def run(context: ArmContext) -> None:
        models = [context.of(FULL) / EXPORT, context.of(BASE) / EXPORT]
        _merge(setting, context, Merged("", "", (), 1.0, "linear", (share, 1 - share)), models)

    name = f"interpolated_{100 * share:.0f}"
    return Arm(name, f"{share:g} BLS + {1 - share:g} base", run, main=False, needs=(*needs, FULL))


def update_arm(setting: Setting, name: str, title: str, chain: Sequence[str], needs: tuple[str, ...],
               by_count: bool = False, main: bool = False) -> Arm:  # fmt: skip
    """A model and its updates, merged one after the other (card 2.2).

    Args:
        setting: Of the experiment.
        name: Of the arm.
        title: In tables.
        chain: The model before, then each update's.
        needs: Arms that are done before.
        by_count: Give each update ``1/(t+1)`` instead of a half.
        main: Whether it is run by default.
    """

    def run(context: ArmContext) -> None:
        current, share = context.of(chain[0]) / EXPORT, 0.0
        for number, update in enumerate(chain[1:], start=1):
            weight = 1 / (number + 1) if by_count else 0.5
            target = context.folder / (MERGED if number + 1 == len(chain) else f"after{number}")
            if not target.exists():
                models = [current, context.of(update) / EXPORT]
                merge_folders(models, target, "multislerp", [1 - weight, weight])
            current = target
            share += read_json(context.of(update) / "results.json")["metrics"]["cost"]
        evaluate(setting, context, current, {"cost": share}, {"steps": 0.0, "tokens": 0.0})

    return Arm(name, title, run, main=main, needs=(*needs, *chain))


def ensemble_arm(setting: Setting, members: tuple[str, ...], cost: float, needs: tuple[str, ...]) -> Arm:
    """All members asked, their similarities averaged: as many times the cost of inference."""

    def run(context: ArmContext) -> None:
        cli = evaluation_cli(setting, context.folder, context.of(members[0]) / EXPORT, execute=False)
        cli.datamodule.setup("test")
        evaluation = cli.datamodule.evaluation("test")
        sides = cli.datamodule.texts("test")
        encoders = [build_encoder(str(context.of(name) / EXPORT)) for name in members]
        vectors = []
        for texts, encode in zip(sides, (_queries, _passages), strict=True):
            parts = [encode(encoder, list(texts.values())) for encoder in encoders]
            vectors.append(dict(zip(texts, side_by_side(parts), strict=True)))
        scores, means = score_tasks(evaluation, *vectors)
        tasks = [one.task for one in evaluation]
        mains = {task.name: scores[task.name][task.main] for task in tasks}
        domains = {task.name: task.domain for task in tasks}
        finish(setting, context, mains, domains, means, {"cost": cost}, {"steps": 0.0, "tokens": 0.0})

    return Arm("ensemble", f"ensemble of {len(members)} members", run, main=False, needs=(*needs, *members))


def side_by_side(parts: Sequence[torch.Tensor]) -> torch.Tensor:
    """Vectors ``(N, D)`` of several members as one of length 1, whose cosine is the mean of theirs."""
    return torch.cat([normalize(part, dim=1) for part in parts], dim=1) / math.sqrt(len(parts))


def _queries(encoder: Any, texts: list[str]) -> torch.Tensor:
    return encoder.encode(texts, "query", progress=False)


def _passages(encoder: Any, texts: list[str]) -> torch.Tensor:
    return encoder.encode(texts, "passage", progress=False) if texts else torch.zeros(0, encoder.embedding_dimension)


def _merge(setting: Setting, context: ArmContext, one: Merged, models: Sequence[Path]) -> None:
    base = context.of(BASE) / EXPORT
    target = context.folder / MERGED
    if not target.exists():
        merge_folders(models, target, one.method, one.weights, base if one.of_base else None, **one.options)
    extra = {"cost": one.cost, "drift": _drift(models, base)}
    if one.method != "linear" and setting.scale != "paper":  # another merge of the same size
        extra["from_linear"] = _from_linear(context.folder, one, models, base)
    evaluate(setting, context, target, extra, {"steps": 0.0, "tokens": 0.0})


def _drift(models: Sequence[Path], base: Path) -> float:
    """Mean over models of the norm of their difference from the base, as a share of the base's norm."""
    (row,) = drift({str(number): model for number, model in enumerate(models)}, base).rows("model")
    return sum(row["ratios"].values()) / len(models)


def _from_linear(folder: Path, one: Merged, models: Sequence[Path], base: Path) -> float:
    """Distance of a merged model from the linear merge, as a share of how far that one is from the base."""
    linear = folder / "linear"
    if not linear.exists():
        merge_folders(models, linear, "linear", one.weights)
    away, apart = (_norm(folder_of, linear) for folder_of in (base, folder / MERGED))
    return apart / away


def _norm(model: Path, other: Path) -> float:
    """Norm of the difference of two models."""
    (row,) = drift({"model": model}, other).rows("model")
    return row["ratios"]["model"] * row["base_norm"]
