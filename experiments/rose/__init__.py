"""ROSE: tree rollouts that branch where words differ in meaning, with credit for each segment."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="rose",
    summary="ROSE (semantically diverse tree rollouts, segment credit) beside GRPO's family and other trees.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.rose:ROSE",
    data="lit_rl.data.prompts:PromptDataModule",
    arms="experiments.rose.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable",),
)
