"""Trained models of the experiment: a base, members, schedules, stages, models of single sets or task types."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.retrieval import exported
from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.presets import is_preset
from lit_core.reproduce import Arm, ArmContext, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_embed.data.task_sources import task_of

BASE, FULL = "base", "bls"
EXPORT, DONE = "export", "cost.json"
WEIGHTS = ("--model.backbone", "--model.lora", "--model.quantization")  # flags that a merged folder has behind it
OLD, NEW, BOTH = "--data.part=old", "--data.part=new", "--data.part=core+new"


@dataclass(frozen=True)
class Trained:
    """A model that is trained: its name and title, the arm it starts from, flags, and its cost.

    Args:
        name: Of the arm.
        title: In tables.
        flags: Of its fit.
        cost: Of the fit, where a run over all data costs 1; None counts rows.
        start: Arm whose model it begins from.
        order: Tells its order of data from that of others; the bag is told by flags.
        main: Whether it is run by default.
        hidden: Whether it is no row of the table.
        smallest_first: Whether sets that follow one another come by increasing size, against the usual order.
    """

    name: str
    title: str
    flags: tuple[str, ...] = ()
    cost: float | None = 1.0
    start: str = BASE
    order: int = 0
    main: bool = False
    hidden: bool = False
    smallest_first: bool = False


def order_seed(context: ArmContext, order: int) -> int:
    """Seed of a model's order of data."""
    return 1000 * context.seed + order


def bag_flags(context: ArmContext, ratio: float, member: int, complement: bool = False) -> list[str]:
    """Flags of a member's bag."""
    fields = {"ratio": f"{ratio:g}", "member": member, "seed": context.seed, "complement": str(complement).lower()}
    return [f"--data.bag.{name}={value}" for name, value in fields.items()]


def names_flag(field: str, names: Sequence[str]) -> str:
    """Flag of the data module that lists names, each in quotes: a file may be called ``2020.jsonl``."""
    return f"--data.{field}={json.dumps(list(names))}"


def start_flags(context: ArmContext, start: str) -> list[str]:
    """Flag that makes a fit begin from another arm's model, if it needs one."""
    return [f"--model.backbone={context.of(start) / EXPORT}"] if start in context.needed else []


def fit(setting: Setting, folder: Path, seed: int, flags: Sequence[str], stage: str | None = None) -> dict[str, float]:
    """Fit and export into a folder; what is done there already is not done again.

    Returns:
        ``steps`` and ``tokens`` of the fit, and the ``rows`` it was given.
    """
    if not (folder / DONE).exists():
        unwatched = [*flags, "--trainer.limit_val_batches=0"]  # nothing is chosen by a score
        cli = setting.fit(folder / "fit", seed, unwatched, stage)
        exported(cli, folder / EXPORT)
        path = cli.folder / "curves.json"
        write_json(folder / "curves.json", read_json(path) if path.exists() else {})
        steps, tokens = cli.trainer.global_step, cli.throughput.tokens
        write_json(folder / DONE, {"steps": float(steps), "tokens": float(tokens), "rows": drawn(cli)})
    return read_json(folder / DONE)


def drawn(cli: Any) -> float:
    """Rows that a fit was given."""
    return float(sum(of["drawn"] for of in cli.datamodule.manifest["datasets"].values()))


def evaluation_cli(setting: Setting, folder: Path, model: Path, execute: bool = True) -> ExperimentCLI:
    """Test the model in a folder; the module then has the scores of every task."""
    args = ["test", *(flag for flag in setting.flags if not flag.startswith(WEIGHTS))]
    args += [f"--model.backbone={model}", "--model.lora.r=0"]
    configs = setting.spec.configs(setting.scale)
    return ExperimentCLI(setting.spec, args, configs, folder / "test", quiet=True, execute=execute)


def evaluate(
    setting: Setting, context: ArmContext, model: Path, extra: Mapping[str, float], cost: Mapping[str, float]
) -> None:
    """Test the model in a folder and write the arm's results; this marks the arm as done."""
    cli = evaluation_cli(setting, context.folder, model)
    module: Any = cli.model
    tasks = [one.task for one in cli.datamodule.evaluation("test") if one.task.name in module.task_scores]
    if not tasks:
        raise InputError("no task was tested whole; allow more batches", field="limit_test_batches")
    scores = {task.name: module.task_scores[task.name][task.main] for task in tasks}
    finish(setting, context, scores, {task.name: task.domain for task in tasks}, module.task_means, extra, cost)


def finish(
    setting: Setting,
    context: ArmContext,
    scores: Mapping[str, float],
    domains: Mapping[str, str],
    means: Mapping[str, float],
    extra: Mapping[str, float],
    cost: Mapping[str, float],
) -> None:
    """Write results from the tasks' main scores: means over tasks, each with its tasks as items."""
    groups = groups_of_tasks(domains, new_sets(setting))
    items = {name: {task: scores[task] for task in of} for name, of in groups.items() if of}
    metrics = {**means, **{name: sum(of.values()) / len(of) for name, of in items.items()}, **extra}
    metrics |= {f"task/{name}": value for name, value in scores.items()}
    if not (context.folder / "curves.json").exists():
        write_json(context.folder / "curves.json", {})
    write_results(context.folder, metrics, items, cost)


def groups_of_tasks(domains: Mapping[str, str], late: Sequence[str]) -> dict[str, list[str]]:
    """Tasks whose scores are averaged together, by the name of the mean.

    Args:
        domains: Domain of each task, ``in`` or ``out``.
        late: Training sets that arrive later; a task is new if one of its sets is.
    """
    within = [name for name, domain in domains.items() if domain == "in"]
    without = [name for name, domain in domains.items() if domain == "out"]
    groups = {"in_domain": within, "out_of_domain": without, "mean_task": list(domains)}
    if late:
        new = {task_of(name) for name in late}
        groups["new_tasks"] = [name for name in domains if name in new]
        groups["old_tasks"] = [name for name in within if name not in new]
    return groups


def new_sets(setting: Setting) -> list[str]:
    """Names of the sets that arrive later, where whole sets do."""
    found = setting.value(None, "data.new")
    return list(found) if isinstance(found, list) else []


def base_arm(setting: Setting) -> Arm:
    """What all models start from and are compared with: the backbone as it is, or a preset that is trained before.

    A preset has random weights: it is trained on all domains, thinly. Any other backbone is exported untrained, so that
    its tensors have the names that the models' exports give them.
    """

    def run(context: ArmContext) -> None:
        if is_preset(setting.value(None, "model.backbone")):
            built_in = ["--data.path=families", "--data.base=true", "--data.hard_negatives=none", "--data.part=all"]
            unset = ("new", "train_on", "types", "leave_out", "held_out", "task_instructions")
            chosen = [f"--data.{name}=null" for name in unset]
            cost = fit(setting, context.folder, 0, [*built_in, *chosen, "--model.lora.r=0"], "base")
        else:
            _export_untrained(setting, context.folder)
            cost = {"steps": 0.0, "tokens": 0.0}
        evaluate(setting, context, context.folder / EXPORT, {"cost": 0.0}, only_costs(cost))

    return Arm(BASE, "base", run, seeded=False)


def _export_untrained(setting: Setting, folder: Path) -> None:
    """Write the backbone without adapters of its own, once."""
    if not (folder / EXPORT).exists():
        args = ["fit", *setting.flags, "--model.lora.r=0"]
        cli: Any = ExperimentCLI(
            setting.spec, args, setting.spec.configs(setting.scale), folder, quiet=True, execute=False
        )
        cli.model.configure_model()
        cli.model.export(folder / EXPORT)


def trained_arm(setting: Setting, one: Trained, needs: tuple[str, ...], bag: tuple[float, int, bool] | None) -> Arm:
    """An arm that trains one model.

    Args:
        setting: Of the experiment.
        one: The model.
        needs: Arms that are done before.
        bag: Ratio, member and whether it is a complement, where the model is a member.
    """

    def run(context: ArmContext) -> None:
        bagged = bag_flags(context, *bag) if bag is not None else []
        flags = [*start_flags(context, one.start), *bagged, *one.flags]
        if one.smallest_first:
            rows = {name: of["rows"] for name, of in sets_of(setting, context).items()}
            flags.append(names_flag("order", sorted(rows, key=lambda name: -rows[name])[::-1]))
        cost = fit(setting, context.folder, order_seed(context, one.order), flags)
        share = one.cost
        if share is None:
            share = cost["rows"] / sum(of["rows"] for of in sets_of(setting, context).values())
        evaluate(setting, context, context.folder / EXPORT, {"cost": share}, only_costs(cost))

    return Arm(one.name, one.title, run, main=one.main, hidden=one.hidden, needs=needs)


def only_costs(cost: Mapping[str, float]) -> dict[str, float]:
    """What a report counts."""
    return {name: cost[name] for name in ("steps", "tokens")}


def two_stage_arm(setting: Setting, needs: tuple[str, ...]) -> Arm:
    """Retrieval first, then the other task types; weights are carried over, the schedule begins anew."""

    def run(context: ArmContext) -> None:
        names = list(dict.fromkeys(of["type"] for of in sets_of(setting, context).values()))
        first, rest = [name for name in names if name == "retrieval"], [name for name in names if name != "retrieval"]
        flags, costs = start_flags(context, BASE), []
        for number, chosen in enumerate(filter(None, (first, rest))):
            folder = context.folder / f"stage{number + 1}"
            wanted = names_flag("types", chosen)
            costs.append(fit(setting, folder, order_seed(context, number), [*flags, wanted]))
            flags = [f"--model.backbone={folder / EXPORT}"]
        evaluate(setting, context, folder / EXPORT, {"cost": 1.0}, total(costs))

    return Arm("two_stage", "retrieval, then the rest", run, main=False, needs=needs)


def total(costs: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Costs of several fits together."""
    return {name: sum(cost[name] for cost in costs) for name in ("steps", "tokens")}


def sets_of(setting: Setting, context: ArmContext) -> dict[str, dict[str, Any]]:
    """Task type and number of rows of each training set."""
    path = context.folder / "sets.json"
    if not path.exists():
        data = data_of(setting)
        data.setup("fit")
        write_json(path, data.training_sets())
    return read_json(path)


def data_of(setting: Setting) -> Any:
    """The data module of the user's flags, nothing read yet."""
    args, configs = ["fit", *setting.flags], setting.spec.configs(setting.scale)
    return ExperimentCLI(setting.spec, args, configs, Path(), quiet=True, execute=False).datamodule


def groups_arm(setting: Setting, name: str, title: str, by: str, needs: tuple[str, ...]) -> Arm:
    """One model a set (``by`` is ``set``), a task type (``type``) or a cluster (``cluster``); nothing is merged yet."""

    def run(context: ArmContext) -> None:
        costs = {}
        for group, sets in _groups(setting, context, by).items():
            wanted = names_flag("train_on", sets)
            folder = context.folder / group
            costs[group] = fit(setting, folder, order_seed(context, 0), [*start_flags(context, BASE), wanted])
        write_json(context.folder / "groups.json", list(costs))
        write_json(context.folder / "curves.json", {})
        measured = read_json(context.of("gains") / "results.json")["metrics"]["cost"] if by == "cluster" else 0.0
        write_results(context.folder, {"cost": 1.0 + measured}, cost=total(list(costs.values())))

    return Arm(name, title, run, main=False, hidden=True, needs=needs)


def _groups(setting: Setting, context: ArmContext, by: str) -> dict[str, list[str]]:
    if by == "cluster":
        return read_json(context.of("gains") / "clusters.json")
    types = {name: of["type"] for name, of in sets_of(setting, context).items()}
    if by == "set":
        return {name: [name] for name in types}
    return {kind: [name for name in types if types[name] == kind] for kind in dict.fromkeys(types.values())}


def group_models(folder: Path) -> list[Path]:
    """The models that a ``groups_arm`` has trained."""
    return [folder / name / EXPORT for name in read_json(folder / "groups.json")]
