"""Arms that train one domain at a time: experts, orders of stages, merges of the experts."""

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from experiments.policies import START, cost_of, evaluate, finish, train
from lit_core.files import read_json, write_json
from lit_core.merging import merge_folders
from lit_core.reproduce import Arm, ArmContext, write_results
from lit_core.results import read_results
from lit_core.setting import Setting
from lit_core.stages import write_export
from lit_rl.modules.evaluation import per_problem, summarise

EXPORT = "export"
FACTORS = (0.5, 0.75, 1.0)  # of task arithmetic; with one over the number of experts it is the uniform merge


def expert_name(domain: str) -> str:
    """Name of the arm that trains on this domain alone."""
    return f"expert_{domain}"


def sequence_name(order: Sequence[str]) -> str:
    """Name of the arm that trains on the domains in this order."""
    return "_".join(("stages", *order))


def stage_flags(setting: Setting, domain: str, stages: int) -> list[str]:
    """Flags of a fit on one domain, for its part of the updates."""
    steps = setting.value(None, "trainer.max_steps")
    limit = [f"--trainer.max_steps={max(1, steps // stages)}"] if steps > 0 else []  # an epoch is shorter by itself
    return [f"--data.train_on=[{domain}]", *limit]


def expert(setting: Setting, needs: tuple[str, ...], domain: str, stages: int) -> Arm:
    """A policy that is trained on one domain, and evaluated on all."""

    def run(context: ArmContext) -> None:
        # the export comes first: what train writes in the end marks the arm as done
        train(setting, context, stage_flags(setting, domain, stages), extra=lambda _: _export(setting, context.folder))

    return Arm(expert_name(domain), f"expert: {domain}", run, needs=needs)


def sequence(setting: Setting, needs: tuple[str, ...], order: Sequence[str]) -> Arm:
    """One domain after the other, beginning with the expert of the first."""
    first, experts = expert_name(order[0]), [expert_name(domain) for domain in order]

    def run(context: ArmContext) -> None:
        folders = [context.of(first)]
        for domain in order[1:]:
            folders.append(context.folder / domain)
            _stage(setting, context, folders[-1], folders[-2] / EXPORT, stage_flags(setting, domain, len(order)))
        found = [read_results(folder) for folder in folders]
        write_json(context.folder / "curves.json", _joined([read_json(f / "curves.json") for f in folders],
                                                           [int(one.cost["steps"]) for one in found]))  # fmt: skip
        own = [one.metrics[f"{domain}/reward"] for domain, one in zip(order, found, strict=True)]
        end = [found[-1].metrics[f"{domain}/reward"] for domain in order]
        best = [read_results(context.of(name)).metrics[f"{domain}/reward"]
                for name, domain in zip(experts, order, strict=True)]  # fmt: skip
        extra = {"forgetting": fmean(a - b for a, b in zip(own[:-1], end[:-1], strict=True)),
                 "rigidity": fmean(a - b for a, b in zip(best[1:], own[1:], strict=True))}  # fmt: skip
        cost = {name: sum(one.cost[name] for one in found[1:]) for name in ("tokens", "steps")}
        write_results(context.folder, {**found[-1].metrics, **extra}, found[-1].per_item, cost)

    title = " → ".join(order)
    return Arm(sequence_name(order), title, run, needs=(*needs, first), reads=tuple(experts[1:]))


def merged(setting: Setting, needs: tuple[str, ...], domains: Sequence[str], method: str) -> Arm:
    """The experts' weights merged into one policy."""
    experts = tuple(map(expert_name, domains))

    def run(context: ArmContext) -> None:
        models = [context.of(name) / EXPORT for name in experts]
        if method == "linear":
            extra, chosen = {}, context.folder / "merged"
            if not chosen.exists():
                merge_folders(models, chosen, method)
        else:
            base = _base(setting, context)
            factors = FACTORS if setting.scale != "smoke" else FACTORS[:1]
            scores = {factor: _factor_score(setting, context, models, base, factor) for factor in factors}
            best = max(scores, key=lambda factor: (scores[factor], -factor))
            extra, chosen = {"factor": best}, context.folder / f"factor_{best:g}" / "merged"
        cli = evaluate(setting, context, chosen, "test")
        write_json(context.folder / "curves.json", {})
        finish(context, cli, extra, cost={"tokens": 0.0, "steps": 0.0})

    titles = {"linear": "uniform merge", "task_arithmetic": "task arithmetic"}
    return Arm(method, titles[method], run, needs=(*needs, *experts))


def _factor_score(setting: Setting, context: ArmContext, models: list[Path], base: Path, factor: float) -> float:
    """Reward on validation problems of ``base + factor * sum of the differences``."""
    folder = context.folder / f"factor_{factor:g}"
    if not (folder / "validation.json").exists():
        if not (folder / "merged").exists():
            merge_folders(models, folder / "merged", "task_arithmetic", [factor] * len(models), base)
        cli: Any = evaluate(setting, context, folder / "merged", "validate")
        write_json(folder / "validation.json", {"reward": summarise(cli.model.results)["reward"]})
    return read_json(folder / "validation.json")["reward"]


def _base(setting: Setting, context: ArmContext) -> Path:
    """Folder of the model that the experts were trained from."""
    if START in context.needed:
        return Path(read_json(context.of(START) / "start.json")["backbone"])
    backbone = setting.value(None, "model.backbone")
    if Path(backbone).is_dir():
        return Path(backbone)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(backbone, allow_patterns=["*.json", "*.safetensors", "*.model", "*.txt"]))


def _stage(setting: Setting, context: ArmContext, folder: Path, backbone: Path, flags: Sequence[str]) -> None:
    """Fit from an earlier stage, evaluate, export; what is there already is not done again."""
    if not (folder / "results.json").exists():
        cli = setting.fit(folder / "fit", context.seed, [f"--model.backbone={backbone}", *flags])
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        results = cli.model.results
        write_json(folder / "curves.json", read_json(folder / "fit" / "curves.json"))
        _export(setting, folder)
        write_results(folder, summarise(results), per_problem(results), cost_of(cli))


def _export(setting: Setting, folder: Path) -> dict[str, float]:
    """Write the policy of a fit, once; there is nothing to measure."""
    if not (folder / EXPORT).exists():
        write_export(setting.spec, folder / "fit" / "last.ckpt", folder / EXPORT, "merged")
    return {}


def _joined(curves: Sequence[dict[str, list[list[float]]]], steps: Sequence[int]) -> dict[str, list[list[float]]]:
    """Curves of stages one after the other."""
    joined: dict[str, list[list[float]]] = {}
    for number, part in enumerate(curves):
        before = sum(steps[:number])
        for name, points in part.items():
            joined.setdefault(name, []).extend([step + before, value] for step, value in points)
    return joined
