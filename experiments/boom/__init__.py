"""BOOM: models trained on samples of every dataset and merged into one, beside training on everything at once."""

from pathlib import Path

from lit_core.cli import Spec, Verb

MERGE = Verb(
    "experiments.boom.merge_command:run",
    "--models A B C --method multislerp --output DIR [--base DIR] [--weights 1 2 3] [--drift]\n"
    "                         merge folders of models, or of adapters, whoever trained them; see `merge --help`",
)
SPEC = Spec(
    name="boom",
    summary="BOOM (bagging and model merging) against training on everything at once.",
    folder=Path(__file__).parent,
    method="lit_embed.methods.boom:Boom",
    data="lit_embed.data.task_datamodule:TaskDataModule",
    arms="experiments.boom.arms:build",
    verbs={"merge": MERGE},
    callbacks=("lit_embed.callbacks.tasks:TaskReport", "lit_embed.callbacks.vectors:VectorWriter"),
    recorders=("lit_embed.callbacks.tasks:MemberRecord",),
    seeds=(0, 1, 2, 3, 4),  # what bags differ in is small beside what seeds do
)
