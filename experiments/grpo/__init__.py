"""GRPO: group-relative policy optimisation and its family, on verifiable rewards."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="grpo",
    summary="GRPO and its family (Dr. GRPO, DAPO, RLOO, REINFORCE++) on verifiable rewards.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.grpo:GRPO",
    data="lit_rl.data.prompts:PromptDataModule",
    arms="experiments.grpo.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable",),
)
