"""A trained reward model against chance, the longer reply, and a linear model of words."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_rl.rewards.pairwise import Dialogue, Rewards, WordPreference, dialogue_length, outcomes, score_pairs

Score = Callable[[Dialogue], float]
BIDIRECTIONAL = ("--model.backbone=tiny-bert",)


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale; that of the paper has no tiny backbone."""

    def trained(name: str, title: str, flags: Sequence[str] = (), main: bool = True) -> Arm:
        def run(context: ArmContext) -> None:
            cli = setting.fit(context.folder / "fit", context.seed, flags)
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            module: Any = cli.model
            curves = cli.folder / "curves.json"
            write_json(context.folder / "curves.json", read_json(curves) if curves.exists() else {})
            cost = {"tokens": float(cli.throughput.tokens), "steps": float(cli.trainer.global_step)}
            _finish(context, module.rewards, cost)

        return Arm(name, title, run, main=main)

    def untrained(name: str, title: str, make: Callable[[Any], Score]) -> Arm:
        def run(context: ArmContext) -> None:
            data = _data(setting, context.folder)
            _finish(context, score_pairs(data.test_pairs, make(data)))

        return Arm(name, title, run, seeded=False)

    bidirectional = trained("bidirectional", "reward model, bidirectional backbone", BIDIRECTIONAL, main=False)
    arms = (
        untrained("chance", "chance", lambda data: lambda dialogue: 0.0),
        untrained("length", "longer reply", lambda data: dialogue_length),
        untrained("words", "linear in words", _word_score),
        trained("reward_model", "reward model"),
        trained("not_centred", "reward model, not centred", ["--model.centre=0"], main=False),
        *([] if setting.scale == "paper" else [bidirectional]),
    )
    claims = (
        Claim("A trained reward model beats chance", "accuracy", "reward_model", "chance"),
        Claim("It beats preferring the longer reply", "accuracy", "reward_model", "length"),
        Claim("It beats a linear model of words", "accuracy", "reward_model", "words"),
        Claim("Keeping rewards around zero does not cost accuracy", "accuracy", "reward_model", "not_centred"),
    )
    return Experiment("reward_model", arms, claims, ("accuracy", "reward_margin"), setting.fingerprint())


def _word_score(data: Any) -> Score:
    chosen, rejected = ([pair[side] for pair in data.train_pairs] for side in ("chosen", "rejected"))
    return WordPreference().fit(chosen, rejected).score


def _data(setting: Setting, folder: Path) -> Any:
    """The data of this scale and these flags, for arms without a model."""
    configs = setting.spec.configs(setting.scale)
    cli = ExperimentCLI(setting.spec, ["test", *setting.flags], configs, folder, quiet=True, execute=False)
    cli.datamodule.setup("test")
    return cli.datamodule


def _finish(context: ArmContext, rewards: Rewards, cost: dict[str, float] | None = None) -> None:
    """Write the share of pairs in the right order, and mark the arm as done."""
    found = outcomes(rewards)
    metrics = {"accuracy": sum(found.values()) / len(found)}
    if cost is not None:
        margins = [chosen - rejected for chosen, rejected in rewards.values()]
        metrics["reward_margin"] = sum(margins) / len(margins)
    write_results(context.folder, metrics, {"accuracy": found}, cost)
