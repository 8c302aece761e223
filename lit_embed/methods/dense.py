"""Dense retrieval: a bi-encoder trained with InfoNCE over in-batch and hard negatives, on any number of devices."""

import torch
import torch.nn.functional as F
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.sharding import average_gradients, gather_rows, maximum, row_offset, share_of_mean, world_size
from lit_embed.functional.losses import candidate_mask, per_query_info_nce
from lit_embed.methods.retriever import Retriever
from lit_embed.modules.batches import PairBatch
from lit_embed.modules.encoder import Encoder
from lit_embed.modules.gradcache import cached_backward
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
        self.temperature, self.symmetric, self.cross_device = temperature, symmetric, cross_device
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
        loss = self.cached_step(batch) if self.grad_cache else self.pair_loss(batch)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.queries)
        return loss

    def cached_step(self, batch: PairBatch) -> Tensor:
        """One optimizer step by GradCache; under DDP the gradients are averaged once, after the last chunk."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert not isinstance(optimizer, list)
        optimizer.zero_grad()
        with self.no_sync():
            loss = cached_backward(
                self.encoder, batch.tokens, lambda vectors: self.contrastive_loss(vectors, batch), self.manual_backward
            )
        average_gradients(self.parameters())
        optimizer.step()
        scheduler.step()  # type: ignore[union-attr]
        return loss

    def contrastive_loss(self, vectors: Tensor, batch: PairBatch) -> Tensor:
        """InfoNCE of a batch (card LLM-QL, section 2.5).

        Averaged over ranks it is the mean over all queries of all ranks, and so are its gradients, also where ranks
        hold different numbers of queries.

        Args:
            vectors: ``(B + N, D)``: the batch's queries, then its passages.
            batch: Targets and keys.
        """
        queries, passages = vectors[: batch.queries], vectors[batch.queries :]
        keys, targets, own = batch.passage_keys, batch.targets, batch.own
        scale = 1.0
        if self.cross_device and world_size() > 1:
            offset = row_offset(len(passages), passages.device)
            passages, keys, targets = gather_rows(passages), gather_rows(keys), targets + offset
            same = batch.passage_keys[:, None] == keys  # the copy that counts may be on another rank
            own = (own.float() @ same.float()).bool()
            scale = share_of_mean(batch.queries, queries.device)
        mask = candidate_mask(keys, batch.positive_keys, targets, own, batch.own_only)
        losses = [self._directions(queries, passages, targets, mask, batch, size) for size in [None, *self.matryoshka]]
        return torch.stack(losses).mean() * scale

    def _directions(
        self, queries: Tensor, passages: Tensor, targets: Tensor, mask: Tensor, batch: PairBatch, size: int | None
    ) -> Tensor:
        queries, passages = queries[:, :size], passages[:, :size]
        forward = per_query_info_nce(queries, passages, self.temperature, targets, mask).mean()
        if not self.symmetric:
            return forward
        everyone, positive_keys = queries, batch.positive_keys
        offset = 0
        if self.cross_device and world_size() > 1:
            widest = maximum(positive_keys.shape[1], queries.device)
            offset = row_offset(len(queries), queries.device)
            everyone = gather_rows(queries)
            positive_keys = gather_rows(F.pad(positive_keys, (0, widest - positive_keys.shape[1]), value=-1))
        own_keys = batch.passage_keys[batch.targets]
        own = torch.arange(len(queries), device=queries.device) + offset
        answers = (positive_keys[None] == own_keys[:, None, None]).any(-1)  # (B, all queries): also answered by it
        answers = answers.scatter(1, own[:, None], False)
        answers |= batch.own_only[:, None] & (own[:, None] != torch.arange(len(everyone), device=own.device))
        backward = per_query_info_nce(passages[targets], everyone, self.temperature, own, answers)
        return (forward + backward.mean()) / 2

    def pair_loss(self, batch: PairBatch) -> Tensor:
        return self.contrastive_loss(self.encoder(batch.tokens), batch)
