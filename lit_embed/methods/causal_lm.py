"""Causal language modelling on unpaired texts: gives a random backbone the prior knowledge that a real one has."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor

from lit_core.backbones import (
    BackboneConfig,
    Lora,
    Quantization,
    load_backbone,
    load_tokenizer,
    text_model,
    transformer_blocks,
    unwrap,
)
from lit_core.errors import InputError
from lit_core.export import new_folder, save_model
from lit_core.lm_head import IGNORE_INDEX, cross_entropy
from lit_core.module import Method
from lit_core.optim import Schedule
from lit_core.sharding import full_tensor, shard, share_of_mean, tie_head
from lit_core.tokens import Tokens, plan_chunks, plan_equal_chunks
from lit_embed.modules.encoder import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS, is_causal


class TextsCollator:
    """Texts to tokens with one end token, truncated before it."""

    def __init__(self, tokenizer: Any, length: int) -> None:
        self.tokenizer, self.length = tokenizer, length

    def __call__(self, rows: Sequence[dict[str, str]]) -> Tokens:
        texts = [row["text"] for row in rows]
        ids = self.tokenizer(texts, truncation=True, max_length=self.length - 1, return_attention_mask=False)
        end = self.tokenizer.eos_token_id
        return Tokens.from_lists([row if row[-1:] == [end] else [*row, end] for row in ids["input_ids"]])


class CausalLM(Method):
    """Next-token prediction, the mean over all tokens of a batch.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        length: Most tokens of a text.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule.
        max_grad_norm: Gradients are scaled down to this norm; None never.
    """

    model: torch.nn.Module

    def __init__(
        self,
        backbone: str,
        length: int = 512,
        loading: BackboneConfig = BackboneConfig(),  # noqa: B008  read only
        lora: Lora = Lora(),  # noqa: B008
        quantization: Quantization | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-4, weight_decay=0.0),
        schedule: Schedule = Schedule(warmup_steps=100),  # noqa: B008
        max_grad_norm: float | None = 1.0,
    ) -> None:
        super().__init__(optimizer, schedule, max_grad_norm)
        self.save_hyperparameters()
        self.backbone, self.length, self.loading = backbone, length, loading
        self.lora, self.quantization = lora, quantization
        self.strict_loading = quantization is None  # quantised layers are not read back from a checkpoint

    def configure_model(self) -> None:
        if "model" in dict(self.named_children()):
            return
        self.tokenizer = load_tokenizer(self.backbone, self.loading.trust_remote_code)
        self.model = load_backbone(self.backbone, "causal_lm", self.loading, self.lora, self.quantization)
        if not is_causal(self.model):
            raise InputError(f"language modelling needs a causal backbone, '{self.backbone}' is bidirectional")
        if self.device_mesh is not None:
            shard(text_model(self.model), self.device_mesh, transformer_blocks(self.model))
            tie_head(unwrap(self.model))

    def lm_collator(self) -> Callable[[list[Any]], Tokens]:
        """Turns texts into a batch; called by the data module."""
        return TextsCollator(self.tokenizer, self.length)

    def batch_tokens(self, batch: Tokens) -> int:
        """Tokens of a training batch, padding not counted."""
        return sum(batch.lengths)

    def forward(self, batch: Tokens) -> Tensor:
        """Mean cross-entropy of a batch in nats a token, shape ``()``; length-sorted chunks without a mask."""
        budget = CPU_CHUNK_TOKENS if batch.ids.device.type == "cpu" else GPU_CHUNK_TOKENS
        sharded = self.device_mesh is not None
        device = batch.ids.device
        plan = plan_equal_chunks(batch.lengths, budget, device) if sharded else (plan_chunks(batch.lengths, budget), [])
        states, labels = [], []
        for number, rows in enumerate(plan[0] + plan[1]):
            ids, valid = batch.pad(rows, self.tokenizer.pad_token_id)
            hidden = text_model(self.model)(input_ids=ids, use_cache=False).last_hidden_state
            keep = valid[:, 1:].bool()
            states.append(hidden[:, :-1][keep])
            labels.append(
                ids[:, 1:][keep] if number < len(plan[0]) else torch.full_like(ids[:, 1:][keep], IGNORE_INDEX)
            )
        head = unwrap(self.model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        weight = full_tensor(head.weight)
        return cross_entropy(torch.cat(states), weight, torch.cat(labels), None if bias is None else full_tensor(bias))

    def training_step(self, batch: Tokens, batch_idx: int) -> Tensor:
        loss = self(batch) * share_of_mean(sum(batch.lengths) - len(batch), batch.ids.device)
        self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(batch))
        return loss

    def validation_step(self, batch: Tokens, batch_idx: int) -> None:
        self.log("val/loss", self(batch), batch_size=len(batch), sync_dist=True)

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a folder for ``AutoModelForCausalLM``."""
        with new_folder(output) as folder:
            save_model(self.model, folder, form, self.backbone, output)
            self.tokenizer.save_pretrained(folder)
