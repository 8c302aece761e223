"""CoCoA (arXiv 2603.01471): content is reconstructed through the end token before vectors are contrasted."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, text_model, transformer_blocks, unwrap
from lit_core.errors import InputError
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import gather_objects, shard, share_of_mean, tie_head
from lit_embed.functional.masks import Bridge
from lit_embed.functional.precision import Ties
from lit_embed.functional.reconstruction import joint_loss
from lit_embed.items import Kind
from lit_embed.methods.cached_step import cached_step
from lit_embed.modules.batches import PairBatch
from lit_embed.modules.bridge_attention import use_bridge_attention
from lit_embed.modules.bridge_decoder import BridgeForm, check_form
from lit_embed.modules.content import bridge_loss, caption_loss, end_shift, warmup_losses
from lit_embed.modules.contrastive import ContrastiveLoss
from lit_embed.modules.image_reconstruction import ImageReconstruction
from lit_embed.modules.multimodal import MultimodalEncoder, build_multimodal_encoder
from lit_embed.modules.multimodal_batches import (
    BridgeCollator,
    EncodeBatch,
    EncodeCollator,
    Hiding,
    ItemPairCollator,
    ReconstructionBatch,
    WarmupCollator,
)
from lit_embed.modules.multimodal_export import export_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig
from lit_embed.multimodal import Key, TrainStage
from lit_embed.retrieval.precision import Precision, evaluate_precision

Stage = Literal["captioning", "warmup", "reconstruction", "contrastive"]
SMALL_GAP = 0.05  # nats a token


def small_gap(gap: float) -> str:
    """What to say of a bridge that tells nothing."""
    return (
        f"val/bridge_gap is {gap:.3f} nats a token: targets are not yet read off their bridge token; train the stage "
        "reconstruction longer before the contrastive one"
    )


class CoCoA(Method):
    """CoCoA in three stages; each starts from the folder that the one before has exported.

    Args:
        backbone: Preset, local folder or hub id of a Qwen2-VL or Qwen2.5-VL model.
        stage: ``warmup`` opens the attention and reconstructs hidden words and pixels; ``reconstruction`` tells a text
            through the bridge token of what it belongs to; ``contrastive`` trains the vectors. ``captioning`` is what
            a pre-trained backbone has behind it: plain captions under causal attention.
        bridge: Who sees whom in the second stage.
        form: How that is computed; all forms are exact.
        text_rate: Share of a caption's tokens that the first stage hides.
        image_rate: Share of an image's tokens that it hides; 0 leaves the images whole.
        image_weight: Weight of the pixels' loss (lambda).
        shared_noise: One row of noise for all hidden patches of an image, as MoCa draws it.
        target_rate: Share of a target's tokens that the second stage hides.
        mask_token: Stands for a hidden token; by default the tokenizer's own, or a row of the embeddings that no token
            has, or ``_`` (llm2vec's) where there is none.
        temperature: Divides the cosine similarity.
        cross_device: Use the targets of all devices as negatives, with exact gradients.
        grad_cache: Bound the memory of the third stage by one chunk (GradCache).
        ties: What a tie is worth in Precision@1; ``compat`` is the authors' rule.
        encoder: Lengths, image size, prompts, attention.
        loading: Precision, attention, checkpointing.
        lora: Adapters, by default in both towers; each stage has its own, merged at its end.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    encoder: MultimodalEncoder
    image_head: ImageReconstruction

    def __init__(
        self,
        backbone: str,
        stage: Stage = "contrastive",
        bridge: Bridge = "collaborative",
        form: BridgeForm = "auto",
        text_rate: float = 0.2,
        image_rate: float = 0.5,
        image_weight: float = 0.5,
        shared_noise: bool = False,
        target_rate: float = 0.7,
        mask_token: str | None = None,
        temperature: float = 0.02,
        cross_device: bool = True,
        grad_cache: bool = False,
        ties: Ties = "wrong",
        encoder: MultimodalConfig = MultimodalConfig(),  # noqa: B008  read only
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=2e-5, weight_decay=0.0),
        schedule: Schedule = Schedule(warmup_steps=100),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(optimizer, schedule, max_grad_norm)
        for name, value, least in (("text_rate", text_rate, False), ("target_rate", target_rate, False),
                                   ("image_rate", image_rate, True)):  # fmt: skip
            if not (0 <= value <= 1 if least else 0 < value <= 1):
                raise InputError(f"is a share, {'from 0' if least else 'above 0'} to 1, got {value}", field=name)
        if not image_weight >= 0:
            raise InputError(f"must be at least 0, got {image_weight}", field="image_weight")
        if not temperature > 0:
            raise InputError(f"must be above 0, got {temperature}", field="temperature")
        if form == "two_pass" and bridge == "collaborative":
            raise InputError("form two_pass needs bridge strict or one_way", field="form")
        self.save_hyperparameters()
        self.backbone, self.stage, self.bridge, self.form = backbone, stage, bridge, form
        self.text_rate, self.image_rate, self.image_weight = text_rate, image_rate, image_weight
        self.shared_noise, self.target_rate, self.mask_token = shared_noise, target_rate, mask_token
        self.ties, self.encoder_config, self.loading = ties, encoder, loading
        self.lora, self.quantization = lora, quantization
        self.loss = ContrastiveLoss(temperature, cross_device=cross_device)
        self.grad_cache = grad_cache and stage == "contrastive"
        self.automatic_optimization = not self.grad_cache
        self.strict_loading = quantization is None  # quantised layers are not read back from a checkpoint
        self.precision: Precision | None = None  # of the last evaluation
        self.vectors: dict[Kind, dict[Key, Tensor]] = {}  # of its queries and of its candidates
        self._encoded: dict[int, Tensor] = {}
        self._names = list[str]()  # of the items to predict

    def configure_model(self) -> None:
        if "encoder" in dict(self.named_children()):
            return
        head = self.stage != "contrastive"
        model = load_backbone(
            self.backbone, "causal_lm" if head else "encoder", self.loading, self.lora, self.quantization
        )
        self.encoder = build_multimodal_encoder(self.backbone, self.encoder_config, self.loading, model=model)
        if self.stage == "reconstruction":
            if self.form in ("auto", "split") and self.loading.attention == "sdpa":
                use_bridge_attention(model)
            check_form(model, self.bridge, self.form)
        if self.stage == "warmup":
            self.image_head = ImageReconstruction(model, seed=self.loading.seed)
        if self.device_mesh is not None:
            shard(text_model(model), self.device_mesh, transformer_blocks(model))
            self.encoder.equal_chunks = True
            if head:
                tie_head(unwrap(model))

    def multimodal_collator(self, stage: TrainStage, train: bool) -> Any:
        """Turns the rows of a stage into a batch; called by the data module.

        Raises:
            InputError: The data are of another stage.
        """
        wanted = "warmup" if self.stage == "captioning" else self.stage
        if stage != wanted:
            raise InputError(f"must be {wanted} for the model's stage {self.stage}, got {stage}", field="data.stage")
        tokenizer = self.encoder.item_tokenizer
        if self.stage == "contrastive":
            return ItemPairCollator(tokenizer)
        if self.stage == "reconstruction":
            return BridgeCollator(tokenizer, self._hiding(self.target_rate), shuffled=not train)
        if self.stage == "captioning":
            return WarmupCollator(tokenizer, self._hiding(0.0))
        hiding = replace(self._hiding(self.text_rate), image=self.image_rate, shared_noise=self.shared_noise)
        return WarmupCollator(tokenizer, hiding)

    def item_collator(self) -> EncodeCollator:
        """Turns items into a batch; called by the data module."""
        return EncodeCollator(self.encoder.item_tokenizer)

    def _hiding(self, rate: float) -> Hiding:
        return Hiding(self._mask_id(), tuple(self.encoder.never_hidden), rate)

    def _mask_id(self) -> int:
        tokenizer: Any = self.encoder.tokenizer
        token, unused = self.mask_token or tokenizer.mask_token, len(tokenizer)
        if token is None and unused < len(text_model(self.encoder.model).get_input_embeddings().weight):
            return unused
        ids = tokenizer(token or "_", add_special_tokens=False)["input_ids"]
        if len(ids) != 1:
            raise InputError(f"must be one token, '{token or '_'}' is {len(ids)}", field="mask_token")
        self.encoder.item_tokenizer.check_special(ids[0], "mask_token")
        return ids[0]

    @contextmanager
    def encoder_in_evaluation(self) -> Iterator[None]:
        """Without dropout inside."""
        training = self.encoder.training
        self.encoder.eval()
        yield
        self.encoder.train(training)

    def batch_tokens(self, batch: Any) -> int:
        """Tokens of a training batch, those of images among them, padding not."""
        return sum(batch.tokens.lengths)

    def forward(self, batch: EncodeBatch) -> Tensor:
        """Vectors ``(n, D)`` of a batch of items."""
        return self.encoder(batch.tokens)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.stage == "contrastive":
            if self.grad_cache:
                loss = cached_step(self, batch, self.loss)
            else:
                loss = self.loss(self.encoder(batch.tokens), batch)
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=batch.queries)
            return loss
        loss = self._reconstruct(batch, train=True)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def _reconstruct(self, batch: ReconstructionBatch, train: bool) -> Tensor:
        """Loss of a batch; in training weighted so that the mean over ranks is that over all their hidden tokens."""
        share = share_of_mean(batch.count, self.device) if train else 1.0
        if self.stage == "captioning":
            return caption_loss(self.encoder, batch) * share
        if self.stage == "reconstruction":
            return bridge_loss(self.encoder, batch, self.bridge, self.form) * share
        text, image = warmup_losses(self.encoder, self.image_head, batch)
        patches = 0 if batch.images is None else len(batch.images.targets)
        image_share = share_of_mean(patches, self.device) if train and self.image_rate else 1.0
        split = "train" if train else "val"
        values = {f"{split}/text_loss": text.detach(), f"{split}/image_loss": image.detach()}
        self.log_dict(values, batch_size=len(batch), sync_dist=not train, add_dataloader_idx=False)
        return joint_loss(text * share, image * image_share, self.image_weight)

    def validation_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        if isinstance(batch, EncodeBatch):
            self._collect(batch)
            return
        if isinstance(batch, PairBatch):
            values, count = {"val/loss": self.loss(self.encoder(batch.tokens), batch)}, batch.queries
        else:
            values, count = self._bridge_values(batch), len(batch)
        self.log_dict(values, batch_size=count, sync_dist=True, add_dataloader_idx=False)

    def _bridge_values(self, batch: ReconstructionBatch) -> dict[str, Tensor]:
        """Loss, and in the second stage what the bridge token tells: the loss behind another row's content less it."""
        true = self._reconstruct(batch, train=False)
        if self.stage != "reconstruction":
            return {"val/loss": true}
        # where there is no other query the same pass again, so that sharded ranks stay in step
        other = self._reconstruct(batch.shuffled or batch, train=False)
        shift = end_shift(self.encoder, batch, self.bridge, self.form)
        return {"val/loss": true, "val/loss_shuffled": other, "val/bridge_gap": other - true, "val/end_shift": shift}

    def on_validation_epoch_start(self) -> None:
        self._encoded = {}

    def on_validation_epoch_end(self) -> None:
        if self._encoded:
            self._evaluate("validate", "val")

    def on_test_epoch_start(self) -> None:
        self._encoded = {}

    def test_step(self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._collect(batch)

    def on_test_epoch_end(self) -> None:
        self._evaluate("test", "test")

    def on_predict_epoch_start(self) -> None:
        """Name the items by image and text; one that is a query and a passage may have two vectors."""
        data: Any = vars(self.trainer)["datamodule"]
        rows = data.items("test")
        queries = {row.item.key for row in rows if row.kind == "query"}
        self._names = [
            "\t".join([*filter(None, reversed(row.item.key)),
                       *(["as a passage"] if row.kind == "passage" and row.item.key in queries else [])])
            for row in rows
        ]  # fmt: skip

    def predict_step(self, batch: EncodeBatch, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
        return {"kind": "items", "ids": [self._names[number] for number in batch.numbers], "vectors": self(batch)}

    def _collect(self, batch: EncodeBatch) -> None:
        for number, vector in zip(batch.numbers, self(batch).float().cpu(), strict=True):
            self._encoded[number] = vector

    def _evaluate(self, split: str, prefix: str) -> None:
        """Precision@1 of every task; an item whose image was left out is chosen by none, and chooses none."""
        found = {number: vector for part in gather_objects(self._encoded) for number, vector in part.items()}
        self._encoded = {}
        data: Any = vars(self.trainer)["datamodule"]
        tasks, items = data.evaluation(split), data.items(split)
        nothing = torch.zeros(self.encoder.embedding_dimension)
        self.vectors = {"query": {}, "passage": {}}
        for row in items:
            self.vectors[row.kind][row.item.key] = found.get(row.number, nothing)
        queries, targets = self.vectors["query"], self.vectors["passage"]
        self.precision = evaluate_precision(queries, tasks, self.ties, normalize=False, targets=targets)
        values = {f"{prefix}/{name}": value for name, value in self.precision.metrics().items()}
        self.log_dict(values, sync_dist=True)

    def on_train_end(self) -> None:
        """Say so where the second stage has not learned to read its bridge: the third then starts from nothing."""
        gap = self.trainer.callback_metrics.get("val/bridge_gap")
        if self.stage == "reconstruction" and gap is not None and gap < SMALL_GAP:
            rank_zero_info(small_gap(float(gap)))

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a folder that ``AutoModel`` and ``AutoProcessor`` load (``merged`` weights or the ``adapter``)."""
        card = f"Trained by {type(self).__name__}, stage {self.stage}, from `{self.backbone}`.\n"
        export_multimodal_encoder(self.encoder, output, form, card, self.backbone)
