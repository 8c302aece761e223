"""Dense retrieval: a contrastive bi-encoder against BM25, the baseline of every other method."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="dense",
    summary="Dense retrieval: a contrastive bi-encoder against BM25.",
    folder=Path(__file__).parent,
    method="lit_embed.methods.dense:Dense",
    data="lit_embed.data.datamodule:RetrievalDataModule",
    arms="experiments.dense.arms:build",
    callbacks=("lit_embed.callbacks.report:RetrievalReport", "lit_embed.callbacks.vectors:VectorWriter"),
)
