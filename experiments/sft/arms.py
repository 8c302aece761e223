"""The warm start by itself: what imitation gives, seed by seed."""

from experiments.policies import TABLE, finish, side_by_side
from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment
from lit_core.setting import Setting


def build(setting: Setting) -> Experiment:
    """One arm with all steps, one with a quarter of them."""

    def trained(name: str, title: str, share: float, main: bool = True) -> Arm:
        def run(context: ArmContext) -> None:
            steps = max(1, round(share * setting.value(None, "trainer.max_steps")))
            cli = setting.fit(context.folder / "fit", context.seed, [f"--trainer.max_steps={steps}"])
            cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
            path = cli.folder / "curves.json"
            write_json(context.folder / "curves.json", read_json(path) if path.exists() else {})
            finish(context, cli)

        return Arm(name, title, run, main=main)

    arms = (trained("quarter", "a quarter of the steps", 0.25), trained("sft", "SFT", 1.0))
    claims = (Claim("More steps of imitation solve more held-out problems", "success", "sft", "quarter"),)
    curves = ("train/loss", "val/success", "val/pass@4", "val/invalid")
    return Experiment("sft", arms, claims, TABLE, setting.fingerprint(), curves, side_by_side(setting))
