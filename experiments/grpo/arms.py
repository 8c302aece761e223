"""GRPO and its family from one warm start, with the same responses an update."""

from collections.abc import Sequence
from pathlib import Path

from experiments.policies import START, TABLE, needs_start, side_by_side, start_arm, train
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment
from lit_core.setting import Setting

PRESETS = Path(__file__).parent / "presets"


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = (START,) if needs_start(setting) else ()

    def trained(name: str, title: str, flags: Sequence[str] = (), main: bool = False) -> Arm:
        def run(context: ArmContext) -> None:
            train(setting, context, flags)

        return Arm(name, title, run, main=main, needs=needs)

    def preset(name: str, title: str) -> Arm:
        return trained(name, title, [f"--config={PRESETS / name}.yaml"])

    starts = (start_arm(setting),) if needs else ()
    arms = (
        *starts,
        trained("grpo", "GRPO", main=True),
        preset("dr_grpo", "Dr. GRPO"),
        preset("dapo", "DAPO"),
        preset("rloo", "RLOO"),
        preset("reinforce_pp", "REINFORCE++"),
        preset("reinforce_pp_baseline", "REINFORCE++-baseline"),
    )
    metric = "success"
    claims = (
        *([Claim("GRPO solves more held-out problems than its start", metric, "grpo", START)] if needs else []),
        Claim("Dr. GRPO beats GRPO", metric, "dr_grpo", "grpo"),
        Claim("DAPO beats GRPO", metric, "dapo", "grpo"),
        Claim("RLOO beats GRPO", metric, "rloo", "grpo"),
        Claim("REINFORCE++ beats GRPO", metric, "reinforce_pp", "grpo"),
    )
    curves = ("val/success", "val/pass@4", "val/entropy", "rollout/reward_mean", "rollout/length_mean")
    return Experiment("grpo", arms, claims, TABLE, setting.fingerprint(), curves, side_by_side(setting))
