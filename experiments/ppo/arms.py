"""PPO from one warm start: its critic's two forms, lambda, and GRPO on as many responses."""

from collections.abc import Sequence

from experiments.policies import START, TABLE, needs_start, side_by_side, start_arm, train
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment
from lit_core.setting import Setting


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = (START,) if needs_start(setting) else ()

    def trained(name: str, title: str, flags: Sequence[str] = (), main: bool = False) -> Arm:
        def run(context: ArmContext) -> None:
            train(setting, context, flags)

        return Arm(name, title, run, main=main, needs=needs)

    arms = (
        *((start_arm(setting),) if needs else ()),
        trained("ppo", "PPO", main=True),
        trained("head", "PPO, value head on the policy", ["--model.critic.kind=head"]),
        trained("decay_95", "PPO, lambda .95", ["--model.decay=0.95"]),
        trained("entropy", "PPO, entropy bonus", ["--model.exploration.kind=entropy"]),
    )
    metric = "success"
    claims = (
        *([Claim("PPO solves more held-out problems than its start", metric, "ppo", START)] if needs else []),
        Claim("A critic of its own beats a value head", metric, "ppo", "head"),
        Claim("lambda .95 beats lambda 1", metric, "decay_95", "ppo"),
    )
    curves = ("val/success", "val/pass@4", "val/entropy", "rollout/reward_mean", "value/explained_variance")
    return Experiment("ppo", arms, claims, TABLE, setting.fingerprint(), curves, side_by_side(setting))
