"""TRE: trust-region entropy for PPO on language models, against other ways to keep exploring."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="tre",
    summary="TRE: trust-region entropy for PPO, against other ways to keep exploring (arXiv 2602.03635).",
    folder=Path(__file__).parent,
    method="lit_rl.methods.tre:TRE",
    data="lit_rl.data.prompts:PromptDataModule",
    arms="experiments.tre.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable",),
)
