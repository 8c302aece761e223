"""LLM-QL (arXiv 2504.05216): query-likelihood pre-training of a decoder, contrastive training, QL re-ranking."""

from dataclasses import replace
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, text_model, unwrap
from lit_core.errors import InputError
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects, rank, share_of_mean, tie_head, world_size
from lit_core.tokens import Tokens
from lit_embed.functional.corruption import Unit
from lit_embed.methods.dense import Dense
from lit_embed.modules.batches import Direction, LikelihoodCollator
from lit_embed.modules.encoder import Encoder, build_encoder
from lit_embed.modules.query_likelihood import Form, LossScope, QueryLikelihood
from lit_embed.modules.tokenization import EncoderConfig
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.ranking import Run

Stage = Literal["query_likelihood", "contrastive"]
RERANK_QUERIES = 256  # whose candidates are held at once: some 10,000 documents, half a megabyte each at 7B
SMALL_GAP = 0.1  # nats a token; a trained bridge gives 1 to 4 (card section 7)


def small_gap(gap: float) -> str:
    """What to say of a first stage that has not learned to read documents."""
    return (
        f"val/ql_gap is {gap:.3f} nats a token: queries are not yet read off their documents; train this stage longer "
        "before the contrastive one"
    )


class LLMQL(Dense):
    """LLM-QL in two stages; the second starts from the folder that the first has exported.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        stage: ``query_likelihood`` trains ``log p(query | end token of the document)``; ``contrastive`` trains the
            bi-encoder.
        attention_stop: Query tokens see nothing of the document but its end token (later versions: attention block).
        corruption: Share of the document's words that are hidden in the first stage (input or document corruption).
        corruption_unit: Hide whole words, or tokens.
        corruption_mask: What stands for a hidden word.
        loss_scope: Predict the query alone, or the document as well (what the authors' code does).
        direction: Which side is generated.
        form: How attention stop is computed; all forms are exact.
        rerank_top_k: In the first stage, ``test`` re-ranks this many BM25 documents a query by query likelihood.
        score_end: Re-ranking counts the query's end token.
        temperature: Divides the cosine similarity.
        symmetric: Average the query-to-passage loss with the passage-to-query loss.
        cross_device: Use the passages of all devices as negatives, with exact gradients.
        grad_cache: Bound the memory of the second stage by one chunk (GradCache).
        matryoshka: Also train these shorter prefixes of the vectors.
        encoder: Pooling, prompts, lengths; both stages wrap texts alike.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        top_k: Documents a query in written runs.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    likelihood: QueryLikelihood

    def __init__(
        self,
        backbone: str,
        stage: Stage = "contrastive",
        attention_stop: bool = True,
        corruption: float = 0.6,
        corruption_unit: Unit = "word",
        corruption_mask: str = "_",
        loss_scope: LossScope = "query",
        direction: Direction = "document_to_query",
        form: Form = "split",
        rerank_top_k: int = 100,
        score_end: bool = True,
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
        super().__init__(
            backbone,
            temperature,
            symmetric,
            cross_device,
            grad_cache and stage == "contrastive",
            matryoshka,
            encoder,
            loading,
            lora,
            quantization,
            top_k,
            optimizer,
            schedule,
            max_grad_norm,
        )
        if not 0 <= corruption <= 1:
            raise InputError(f"corruption must be a probability, got {corruption}")
        if encoder.pooling not in (None, "eos", "last"):
            raise InputError(f"LLM-QL pools the end token: pooling must be eos or last, got {encoder.pooling}")
        self.save_hyperparameters()
        self.stage, self.attention_stop, self.loss_scope, self.form = stage, attention_stop, loss_scope, form
        self.corruption, self.corruption_unit, self.corruption_mask = corruption, corruption_unit, corruption_mask
        self.direction, self.rerank_top_k, self.score_end = direction, rerank_top_k, score_end

    def build_encoder(self) -> Encoder:
        if self.stage == "contrastive":
            encoder = super().build_encoder()
            self._check(encoder)
            return encoder
        model = load_backbone(self.backbone, "causal_lm", self.loading, self.lora, self.quantization)
        config = replace(self.encoder_config, pooling=self.encoder_config.pooling or "eos")
        encoder = build_encoder(self.backbone, config, self.loading, model=text_model(model))
        self._check(encoder)
        self.likelihood = QueryLikelihood(
            model, encoder.tokenizer.pad_token_id, self.form, self.attention_stop, self.encoder_config.chunk_tokens
        )
        return encoder

    def _check(self, encoder: Encoder) -> None:
        if not encoder.causal:
            raise InputError(f"LLM-QL needs a causal language model, '{self.backbone}' is bidirectional")
        if encoder.config.pooling not in ("eos", "last"):
            raise InputError(f"LLM-QL pools the end token, '{self.backbone}' {encoder.config.pooling}")

    def configure_model(self) -> None:
        super().configure_model()
        if self.stage == "query_likelihood" and self.device_mesh is not None:
            tie_head(unwrap(self.likelihood.model))
            self.likelihood.equal_chunks = True

    def pair_collator(self, train: bool) -> Any:
        if self.stage == "contrastive":
            return super().pair_collator(train)
        rate = self.corruption if train else 0.0
        return LikelihoodCollator(
            self.encoder.text_tokenizer,
            rate,
            self.corruption_unit,
            self.corruption_mask,
            self.direction if train or self.direction == "query_to_document" else "document_to_query",
            shuffled=not train,
        )

    def batch_tokens(self, batch: Any) -> int:
        if self.stage == "contrastive":
            return super().batch_tokens(batch)
        return sum(batch.documents.lengths) + sum(batch.queries.lengths)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.stage == "contrastive":
            return super().training_step(batch, batch_idx)
        loss = self.likelihood(batch.documents, batch.queries, self.loss_scope)
        labels = sum(batch.queries.lengths)
        if self.loss_scope == "document_and_query":
            labels += sum(batch.documents.lengths) - len(batch.documents)
        loss = loss * share_of_mean(labels, loss.device)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch.queries))
        return loss

    def validate_pairs(self, batch: Any) -> None:
        """In the first stage, log what a document tells of its query: the loss given the true and another document.

        A batch with one document has no other one and counts nothing in the gap.
        """
        if self.stage == "contrastive":
            super().validate_pairs(batch)
            return
        true = self.likelihood(batch.documents, batch.queries)
        self._log_pairs({"val/loss": true}, len(batch.queries))
        other = self.likelihood(batch.shuffled or batch.documents, batch.queries)
        count = len(batch.queries) if batch.shuffled is not None else 0  # yet all ranks run the same passes
        self._log_pairs({"val/loss_shuffled": other, "val/ql_gap": other - true}, count)

    def on_train_end(self) -> None:
        """Say so where the first stage has not learned to read documents: the second then starts from nothing."""
        gap = self.trainer.callback_metrics.get("val/ql_gap")
        if self.stage == "query_likelihood" and gap is not None and gap < SMALL_GAP:
            rank_zero_info(small_gap(float(gap)))

    def further_runs(self, collection: Any) -> dict[str, Run]:
        """In the first stage, BM25's best documents re-ranked by query likelihood, and BM25 itself below them."""
        if self.stage == "contrastive" or self.rerank_top_k == 0:
            return {}
        first = BM25(collection.corpus).search(collection.queries, self.rerank_top_k)
        return {"QL re-ranking of BM25": self.rerank(first, collection.queries, collection.corpus)}

    @torch.no_grad()
    def rerank(self, run: Run, queries: dict[str, str], corpus: dict[str, str]) -> Run:
        """Score the documents of a first-stage run by query likelihood (card section 2.6).

        A document is encoded once for some hundred queries that it was found for; the queries are shared out over the
        ranks.

        Args:
            run: First-stage run.
            queries: Text by query id.
            corpus: Text by document id.

        Returns:
            The same documents, scored by the summed log-probability of the query and its end token, in nats.
        """
        self.likelihood.eval()
        asked = [query_id for query_id in run if run[query_id]]
        count = -(-len(asked) // world_size())  # sharded ranks gather weights in step: all have as many queries
        mine = [asked[(rank() + number * world_size()) % len(asked)] for number in range(count)]
        found: Run = {}
        for start in range(0, count, RERANK_QUERIES):
            found |= self._score_candidates(mine[start : start + RERANK_QUERIES], run, queries, corpus)
        return {query_id: docs for part in gather_objects(found) for query_id, docs in part.items()}

    def _score_candidates(self, query_ids: list[str], run: Run, queries: dict[str, str], corpus: dict[str, str]) -> Run:
        """Score the candidates of some queries; what is kept of their documents lives in memory meanwhile."""
        doc_ids = sorted({doc_id for query_id in query_ids for doc_id in run[query_id]})
        place = {doc_id: number for number, doc_id in enumerate(doc_ids)}
        pairs = [(number, place[doc_id]) for number, query_id in enumerate(query_ids) for doc_id in run[query_id]]
        collator = LikelihoodCollator(self.encoder.text_tokenizer, 0.0, mask=self.corruption_mask)
        targets = Tokens.from_lists([collator.target(queries[query_id], "query") for query_id in query_ids])
        documents = self.encoder.tokenize([corpus[doc_id] for doc_id in doc_ids], "passage").to(self.device)
        columns = self.likelihood.columns(documents)
        numbers = torch.tensor(pairs, device=self.device)
        scores = self.likelihood.score(columns, numbers, targets.to(self.device), self.score_end)
        found: Run = {}
        for (number, document), score in zip(pairs, scores.tolist(), strict=True):
            found.setdefault(query_ids[number], {})[doc_ids[document]] = score
        return found

    def exported_model(self) -> Any:
        return self.encoder.model if self.stage == "contrastive" else self.likelihood.model
