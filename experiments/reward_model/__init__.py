"""Reward model: a head on any backbone learns preferences, against length and words."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="reward_model",
    summary="Reward model: a head on any backbone learns preferences, against length and words.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.reward_model:RewardModelling",
    data="lit_rl.data.preferences:PreferenceDataModule",
    arms="experiments.reward_model.arms:build",
    callbacks=("lit_rl.callbacks.preferences:PreferenceReport",),
)
