"""MGS: one policy for several domains by modular gradient surgery, beside mixing, stages and merging."""

from pathlib import Path

from lit_core.cli import Spec

DATA = "lit_rl.data.domains:DomainDataModule"
SPEC = Spec(
    name="mgs",
    summary="MGS (modular gradient surgery) for RL on several domains, beside mixing, stages and merging.",
    folder=Path(__file__).parent,
    method="lit_rl.methods.mgs:MGS",
    data=DATA,
    arms="experiments.mgs.arms:build",
    callbacks=("lit_rl.callbacks.report:PolicyReport",),
    recorders=("lit_rl.callbacks.samples:SampleTable", "lit_rl.callbacks.interference:InterferenceMap"),
)
START_SPEC = Spec(  # the warm start: one policy that has seen solutions of every domain
    name="mgs_start",
    summary="SFT on solutions of all domains of MGS.",
    folder=Path(__file__).parent / "start",
    method="lit_rl.methods.sft:SFT",
    data=DATA,
    arms="experiments.sft.arms:build",
)
