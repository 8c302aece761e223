"""CoCoA: content reconstruction through the end token, for vectors of images and texts."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="cocoa",
    summary="CoCoA: content reconstructed through the end token, then contrastive training (arXiv 2603.01471).",
    folder=Path(__file__).parent,
    method="lit_embed.methods.cocoa:CoCoA",
    data="lit_embed.data.multimodal_datamodule:MultimodalDataModule",
    arms="experiments.cocoa.arms:build",
    stages=("warmup", "reconstruction", "contrastive"),
    callbacks=("lit_embed.callbacks.precision:PrecisionReport", "lit_embed.callbacks.vectors:VectorWriter"),
)
