"""Arms that experiments on policies share: the warm start, and a trained policy turned into results."""

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from experiments.sft import SPEC as SFT
from lit_core.cli import Spec
from lit_core.files import read_json, write_json
from lit_core.presets import is_preset
from lit_core.report import versions
from lit_core.reproduce import Arm, ArmContext, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI, write_export
from lit_rl.modules.evaluation import ProblemResult, per_problem, summarise

START = "sft"
CACHE_VARIABLE = "LIT_CACHE"
FORWARDED = (  # which of the user's flags the warm start takes too
    *("--model.backbone", "--model.loading", "--model.prompt", "--data.countdown", "--data.task", "--data.held_out"),
    "--data.domains",
    *("--trainer.accelerator", "--trainer.devices", "--trainer.precision", "--trainer.logger"),
)
WEIGHTS = ("--model.backbone", "--model.lora", "--model.quantization")  # flags that a merged folder has behind it
TABLE = ("success", "pass@4", "invalid", "distinct_correct", "length", "entropy", "tail_mass")


def cache_folder() -> Path:
    """Where trained warm starts are kept: ``$LIT_CACHE``, or the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(os.environ.get(CACHE_VARIABLE) or Path(base) / "lit-suite")


def side_by_side(setting: Setting) -> int:
    """Runs at a time: a tiny policy is too small for more than one core, a real one wants the machine for itself."""
    return 1 if setting.scale == "paper" else os.cpu_count() or 1


def needs_start(setting: Setting) -> bool:
    """Whether the policy has random weights, which no reward can teach."""
    return is_preset(setting.value(None, "model.backbone"))


def start_arm(
    setting: Setting,
    name: str = START,
    flags: Sequence[str] = (),
    main: bool = True,
    warm: Sequence[str] = (),
    spec: Spec = SFT,
) -> Arm:
    """The policy that reinforcement learning starts from: trained on solutions once a machine, then evaluated.

    Args:
        setting: The experiment that uses it.
        name: Name of the arm.
        flags: Further flags of its fit and of its evaluation.
        main: Whether it is run by default.
        warm: Flags of the fit alone, under those that the user has given.
        spec: What is fitted.
    """
    start = _warm_setting(setting, flags, warm, spec)

    def run(context: ArmContext) -> None:
        folder = warm_start(start, context.seed)
        cli = evaluate(setting, context, folder / "export", "test", flags)
        write_json(context.folder / "curves.json", {})
        write_json(context.folder / "start.json", {"backbone": str(folder / "export")})
        finish(context, cli, cost=read_json(folder / "cost.json"))

    return Arm(name, "start (SFT)" if name == START else f"start (SFT), {name}", run, main=main, seeded=False)


def evaluate(
    setting: Setting, context: ArmContext, backbone: Path, verb: str, flags: Sequence[str] = ()
) -> ExperimentCLI:
    """Run ``test`` or ``validate`` of the policy in a model folder; its results are those of the module."""
    args = [flag for flag in (*setting.flags, *flags) if not flag.startswith(WEIGHTS)]
    args += [f"--model.backbone={backbone}", f"--seed_everything={context.seed}"]
    configs = setting.spec.configs(setting.scale)
    return ExperimentCLI(setting.spec, [verb, *args], configs, context.folder / verb, quiet=True)


def warm_start(setting: Setting, seed: int) -> Path:
    """Train the warm start unless it lies in the cache already; a fit that was cut off goes on.

    Returns:
        Folder with ``export`` and ``cost.json``.
    """
    text = "\n".join([setting.fingerprint(), str(seed), versions().get("lit-suite", "")])
    folder = cache_folder() / "warm_start" / hashlib.sha256(text.encode()).hexdigest()[:16]
    if not (folder / "cost.json").exists():
        cli = setting.fit(folder / "fit", seed)
        if not (folder / "export").exists():
            write_export(setting.spec, folder / "fit" / "last.ckpt", folder / "export", "merged")
        write_json(folder / "cost.json", cost_of(cli))  # marks the folder as complete
    return folder


def _warm_setting(setting: Setting, flags: Sequence[str], warm: Sequence[str], spec: Spec) -> Setting:
    kept = tuple(flag for flag in (*setting.flags, *flags) if flag.startswith(FORWARDED))
    configs = [Path(flag.partition("=")[2]) for flag in warm if flag.startswith("--config=")]
    texts = "\n".join(path.read_text() for path in configs)  # the fingerprint is that of the files' content
    return replace(setting, spec=spec, flags=(*warm, *kept), further=texts)


def backbone_flags(context: ArmContext, start: str = START) -> list[str]:
    """Flag that makes a fit begin from a start arm that it needs, if it does."""
    if start not in context.needed:
        return []
    return [f"--model.backbone={read_json(context.of(start) / 'start.json')['backbone']}"]


def finish(
    context: ArmContext,
    cli: ExperimentCLI,
    extra: Mapping[str, float] | None = None,
    cost: Mapping[str, float] | None = None,
) -> None:
    """Write an arm's results from the policy's responses to the test problems.

    Args:
        context: The arm.
        cli: A run whose last evaluation was that of the test split.
        extra: Further metrics.
        cost: What it cost, where that is not what the run says.
    """
    module: Any = cli.model
    results: list[ProblemResult] = module.results
    items = per_problem(results)
    write_results(context.folder, {**summarise(results), **(extra or {})}, items, cost or cost_of(cli))


def train(
    setting: Setting,
    context: ArmContext,
    flags: Sequence[str],
    start: str = START,
    extra: Callable[[Any], Mapping[str, float]] | None = None,
) -> None:
    """Fit a policy from its start, evaluate it on the test problems, and write results and curves.

    Args:
        setting: Of the experiment.
        context: The arm.
        flags: Of its fit.
        start: Name of the arm that it begins from.
        extra: Further metrics of the fitted run.
    """
    cli = setting.fit(context.folder / "fit", context.seed, [*backbone_flags(context, start), *flags])
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    path = cli.folder / "curves.json"
    write_json(context.folder / "curves.json", read_json(path) if path.exists() else {})
    finish(context, cli, extra(cli) if extra else None)


def cost_of(cli: ExperimentCLI) -> dict[str, float]:
    """What a fit has cost."""
    return {"tokens": float(cli.throughput.tokens), "steps": float(cli.trainer.global_step)}
