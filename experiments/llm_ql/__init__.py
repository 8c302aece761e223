"""LLM-QL: query-likelihood pre-training of a decoder before contrastive training, against equal compute."""

from pathlib import Path

from lit_core.cli import Spec

SPEC = Spec(
    name="llm_ql",
    summary="LLM-QL: query-likelihood pre-training of a decoder, then contrastive training (arXiv 2504.05216).",
    folder=Path(__file__).parent,
    method="lit_embed.methods.llm_ql:LLMQL",
    data="lit_embed.data.datamodule:RetrievalDataModule",
    arms="experiments.llm_ql.arms:build",
    stages=("query_likelihood", "contrastive"),
    callbacks=("lit_embed.callbacks.report:RetrievalReport", "lit_embed.callbacks.vectors:VectorWriter"),
    aliases={
        "--model.attention_block": "--model.attention_stop",
        "--model.input_corruption": "--model.corruption",
        "--model.document_corruption": "--model.corruption",
    },
)
