"""PPO: clipped policy gradient with a value function, on verifiable or learned rewards."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="ppo",
    summary="PPO with a value function, on verifiable or learned rewards.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.ppo:PPO",
    data="lit_rl.data.prompts:PromptDataModule",
    arms="experiments.ppo.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable",),
)
