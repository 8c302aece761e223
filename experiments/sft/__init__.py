"""SFT: supervised fine-tuning on solutions, the warm start of reinforcement learning."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="sft",
    summary="SFT: supervised fine-tuning on solutions, the warm start of reinforcement learning.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.sft:SFT",
    data="lit_rl.data.prompts:PromptDataModule",
    arms="experiments.sft.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable",),
)
