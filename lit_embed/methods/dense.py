"""Dense retrieval: a bi-encoder trained with InfoNCE over in-batch and hard negatives, on any number of devices."""

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_embed.methods.cached_step import cached_step
from lit_embed.methods.retriever import Retriever
from lit_embed.modules.batches import PairBatch
from lit_embed.modules.contrastive import ContrastiveLoss
from lit_embed.modules.encoder import Encoder
from lit_embed.modules.tokenization import EncoderConfig


class Dense(Retriever):
    """Contrastive bi-encoder (Karpukhin et al. 2020; for decoders as in RepLLaMA, Ma et al. 2023).

    Args:
        backbone: Preset, local folder or hub id.
        temperature: Divides the cosine similarity.
        symmetric: Average the query-to-passage loss with the passage-to-query loss.
        cross_device: Use the passages of all devices as negatives, with exact gradients.
        grad_cache: Bound the memory by one chunk at the price of a second forward pass (GradCache).
        matryoshka: Also train these shorter prefixes of the vectors; the loss is the mean over lengths.
        encoder: Pooling, prompts, lengths.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        top_k: Documents a query in written runs.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    def __init__(
        self,
        backbone: str,
        temperature: float = 0.01,
        symmetric: bool = False,
        cross_device: bool = True,
        grad_cache: bool = False,
        matryoshka: list[int] | None = None,
        encoder: EncoderConfig = EncoderConfig(),  # noqa: B008  read only
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        top_k: int = 1000,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        schedule: Schedule = Schedule(warmup_steps=100),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(backbone, encoder, loading, lora, quantization, top_k, optimizer, schedule, max_grad_norm)
        if not temperature > 0:
            raise InputError(f"temperature must be above 0, got {temperature}")
        if matryoshka and min(matryoshka) < 1:
            raise InputError(f"matryoshka lengths must be at least 1, got {min(matryoshka)}")
        self.save_hyperparameters()
        self.loss = ContrastiveLoss(temperature, symmetric, cross_device, tuple(matryoshka or ()))
        self.grad_cache, self.matryoshka = grad_cache, matryoshka or []
        self.automatic_optimization = not grad_cache

    def build_encoder(self) -> Encoder:
        encoder = super().build_encoder()
        if self.matryoshka and max(self.matryoshka) > encoder.embedding_dimension:
            raise InputError(
                f"matryoshka lengths must be at most {encoder.embedding_dimension}, the length of the vectors, got "
                f"{max(self.matryoshka)}"
            )
        return encoder

    def training_step(self, batch: PairBatch, batch_idx: int) -> Tensor:
        loss = cached_step(self, batch, self.contrastive_loss) if self.grad_cache else self.pair_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.queries)
        return loss

    def contrastive_loss(self, vectors: Tensor, batch: PairBatch) -> Tensor:
        """InfoNCE of a batch, see :class:`lit_embed.modules.contrastive.ContrastiveLoss`."""
        return self.loss(vectors, batch)

    def pair_loss(self, batch: PairBatch) -> Tensor:
        return self.contrastive_loss(self.encoder(batch.tokens), batch)
