"""What every dense retriever shares: the encoder, its collators, evaluation, prediction, export."""

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, transformer_blocks, unwrap
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import shard
from lit_embed.items import Kind
from lit_embed.modules.batches import PairBatch, PairCollator, TextBatch, TextCollator
from lit_embed.modules.encoder import Encoder, build_encoder
from lit_embed.modules.evaluation import Vectors, dense_run, update_metrics
from lit_embed.modules.export import export_encoder
from lit_embed.modules.tokenization import EncoderConfig
from lit_embed.retrieval.evaluate import evaluate
from lit_embed.retrieval.metrics import RetrievalMetrics
from lit_embed.retrieval.ranking import Run

METRICS = ("ndcg@10", "mrr@10", "recall@100")
QUERIES, CORPUS, PAIRS = 0, 1, 2  # the dataloaders of validation, in order


class Retriever(Method):
    """Base of dense retrievers; a method adds its training step.

    Args:
        backbone: Preset, local folder or hub id.
        encoder: Pooling, prompts, lengths.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        top_k: Documents a query in written runs.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm.
    """

    encoder: Encoder

    def __init__(
        self,
        backbone: str,
        encoder: EncoderConfig,
        loading: BackboneConfig,
        lora: Lora,
        quantization: Quantization | None,
        top_k: int,
        optimizer: OptimizerCallable,
        schedule: Schedule,
        max_grad_norm: float | None,
    ) -> None:
        super().__init__(optimizer, schedule, max_grad_norm)
        self.backbone, self.encoder_config, self.loading = backbone, encoder, loading
        self.lora, self.quantization, self.top_k = lora, quantization, top_k
        self.strict_loading = quantization is None  # quantised layers are not read back from a checkpoint
        self.validation_metrics = RetrievalMetrics(METRICS)
        self.collected: tuple[Vectors, Vectors] = (Vectors(), Vectors())
        self.runs: dict[str, Run] = {}

    def configure_model(self) -> None:
        """Build the encoder once, and shard it where the strategy has a device mesh."""
        if "encoder" in dict(self.named_children()):
            return
        self.encoder = self.build_encoder()
        if self.device_mesh is not None:
            shard(unwrap(self.encoder.model), self.device_mesh, transformer_blocks(self.encoder.model))
            self.encoder.equal_chunks = True

    def build_encoder(self) -> Encoder:
        """Load backbone and tokenizer."""
        return build_encoder(self.backbone, self.encoder_config, self.loading, self.lora, self.quantization)

    def pair_collator(self, train: bool) -> Any:
        """Turns pair items into a batch; called by the data module."""
        return PairCollator(self.encoder.text_tokenizer)

    def text_collator(self, kind: Kind) -> TextCollator:
        """Turns texts into a batch; called by the data module."""
        return TextCollator(self.encoder.text_tokenizer, kind)

    def batch_tokens(self, batch: Any) -> int:
        """Tokens of a training batch, padding not counted."""
        return sum(batch.tokens.lengths)

    def forward(self, batch: TextBatch) -> Tensor:
        """Vectors ``(n, D)`` of a batch of texts."""
        return self.encoder(batch.tokens)

    def pair_loss(self, batch: PairBatch) -> Tensor:
        """Loss of a validation batch of pairs, shape ``()``."""
        raise NotImplementedError

    def on_validation_epoch_start(self) -> None:
        self.collected = (Vectors(), Vectors())

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if dataloader_idx == PAIRS:
            self.validate_pairs(batch)
        else:
            self.collected[dataloader_idx].add(batch, self(batch))

    def validate_pairs(self, batch: Any) -> None:
        """Log ``val/loss`` of a batch of pairs."""
        self._log_pairs({"val/loss": self.pair_loss(batch)}, batch.queries)

    def on_validation_epoch_end(self) -> None:
        collection = self._data().collection("validate")
        update_metrics(self.validation_metrics, *self.collected, collection.qrels, top_k=100)
        values = self.validation_metrics.compute()
        self.validation_metrics.reset()
        self.log_dict({f"val/{name}": value for name, value in values.items()}, prog_bar=True, sync_dist=True)

    def on_test_epoch_start(self) -> None:
        self.collected = (Vectors(), Vectors())

    def test_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self.collected[dataloader_idx].add(batch, self(batch))

    def on_test_epoch_end(self) -> None:
        """Rank the corpus and log ``test/*``; ``self.runs`` keeps the runs for whoever writes them."""
        collection = self._data().collection("test")
        self.runs = {type(self).__name__: dense_run(*self.collected, self.top_k)}
        values = evaluate(self.runs[type(self).__name__], collection.qrels, METRICS)
        self.log_dict({f"test/{name}": value for name, value in values.items()}, sync_dist=True)
        self.runs |= self.further_runs(collection)

    def further_runs(self, collection: Any) -> dict[str, Run]:
        """Other rankings of the test queries, by name."""
        return {}

    def predict_step(self, batch: TextBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        kind: Literal["queries", "corpus"] = "queries" if dataloader_idx == QUERIES else "corpus"
        return {"kind": kind, "ids": batch.ids, "vectors": self(batch)}

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a sentence-transformers folder (``merged`` weights or the ``adapter``)."""
        settings = asdict(self.encoder.config)
        card = f"Trained by {type(self).__name__} from `{self.backbone}`.\n\nSettings: `{settings}`\n"
        export_encoder(self.encoder, output, form, self.exported_model(), card, self.backbone)

    def exported_model(self) -> Any:
        """The model whose weights an export holds."""
        return self.encoder.model

    def _data(self) -> Any:
        return vars(self.trainer)["datamodule"]

    def _log_pairs(self, values: dict[str, Tensor], count: int) -> None:
        self.log_dict(values, batch_size=count, sync_dist=True, add_dataloader_idx=False)
