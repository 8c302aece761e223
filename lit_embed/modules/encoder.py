"""Texts to vectors: prompts, tokens, backbone, pooling, matryoshka truncation, normalisation."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, load_tokenizer, text_model
from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.packed import packed_linears
from lit_core.progress import track
from lit_core.tokens import Tokens
from lit_embed.functional.pooling import Pooling, finish, pool
from lit_embed.items import Kind
from lit_embed.modules.chunks import CPU_CHUNK_TOKENS as CPU_CHUNK_TOKENS  # others import them from here
from lit_embed.modules.chunks import GPU_CHUNK_TOKENS as GPU_CHUNK_TOKENS
from lit_embed.modules.chunks import ChunkedEncoder
from lit_embed.modules.tokenization import EncoderConfig, TextTokenizer

DEFAULT_LENGTH = 512  # tokens, where neither the user, the folder nor the tokenizer says less


class Encoder(ChunkedEncoder[Tokens]):
    """A bi-encoder's one tower.

    The tokenizer's post-processor is rewritten so that the suffix and the end token are its own: truncation then keeps
    them, and an exported folder gives the same tokens in sentence-transformers and in plain transformers.

    Args:
        model: A transformers (or peft) model that gives token states.
        tokenizer: Its fast tokenizer.
        config: Settings, with nothing left open (see :func:`build_encoder`).
    """

    def __init__(self, model: nn.Module, tokenizer: Any, config: EncoderConfig) -> None:
        super().__init__()
        self.model = model
        self.config = config
        self.text_tokenizer = TextTokenizer(tokenizer, config)
        self.tokenizer = self.text_tokenizer.tokenizer
        self.causal = is_causal(model)

    @property
    def embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.config.dimensions or text_model(self.model).config.hidden_size

    def tokenize(self, texts: Sequence[str], kind: Kind) -> Tokens:
        """Token ids of texts with prompt, suffix and end token, truncated before the suffix."""
        return self.text_tokenizer(texts, kind)

    def encode_chunk(self, tokens: Tokens, rows: Sequence[int]) -> Tensor:
        """Vectors of some of the texts in one padded forward pass."""
        return self.encode_padded(*tokens.pad(rows, self.tokenizer.pad_token_id))

    def encode_padded(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Vectors of a padded batch.

        Args:
            input_ids: Long ``(B, L)``.
            attention_mask: ``(B, L)``, 1 = token; padding may stand on either side.

        Returns:
            Float32 ``(B, D)``; the same whatever else is in the batch.
        """
        inputs: dict[str, Any] = {"input_ids": input_ids, "attention_mask": attention_mask}
        if self._left_padded(attention_mask):
            inputs["position_ids"] = (attention_mask.cumsum(1) - 1).clamp(min=0)
        elif self.causal:  # no token sees the padding behind it: the faster kernels without a mask are exact
            del inputs["attention_mask"]
        if self.causal:
            inputs["use_cache"] = False
        hidden = self.model(**inputs).last_hidden_state
        config = self.config
        assert config.pooling is not None  # build_encoder has settled it
        return finish(pool(hidden, attention_mask, config.pooling), config.dimensions, config.normalize is not False)

    @torch.no_grad()
    def encode(self, texts: Sequence[str], kind: Kind, block: int = 2048, progress: bool = True) -> Tensor:
        """Vectors of any number of texts, in evaluation mode; equal texts are encoded once.

        Args:
            texts: The texts.
            kind: Chooses prompt and length.
            block: Texts tokenised at a time; bounds the memory.
            progress: Show a bar once this has taken two seconds.

        Returns:
            Float32 ``(N, D)`` on the CPU.
        """
        distinct = sorted(set(texts), key=len, reverse=True)  # neighbours of like length make tight chunks
        device = next(self.model.parameters()).device
        training = self.training
        self.eval()
        parts = []
        blocks = range(0, len(distinct), block)
        title = {"query": "encoding queries", "passage": "encoding passages"}[kind]
        with packed_linears(self.model):
            for start in track(blocks, title, unit="block") if progress else blocks:
                parts.append(self(self.tokenize(distinct[start : start + block], kind).to(device)).cpu())
        self.train(training)
        if not parts:
            return torch.empty(0, self.embedding_dimension)
        place = {text: row for row, text in enumerate(distinct)}
        return torch.cat(parts)[torch.tensor([place[text] for text in texts])]

    def _left_padded(self, attention_mask: Tensor) -> bool:
        return self.tokenizer.padding_side == "left" and bool((attention_mask[:, 0] == 0).any())


def build_encoder(
    backbone: str,
    config: EncoderConfig | None = None,
    loading: BackboneConfig | None = None,
    lora: Lora | None = None,
    quantization: Quantization | None = None,
    model: nn.Module | None = None,
) -> Encoder:
    """Load a backbone and its tokenizer and settle what the configuration leaves open.

    Args:
        backbone: Preset, local folder (also one of sentence-transformers), or hub id.
        config: Settings of the encoder.
        loading: Precision, attention, checkpointing.
        lora: Adapters to add.
        quantization: Load in 8 or 4 bits.
        model: An already loaded model of that backbone, whose token states are used.

    Raises:
        InputError: What :func:`lit_core.backbones.load_backbone` raises, or a setting that does not fit.
    """
    loading = loading or BackboneConfig()
    tokenizer = load_tokenizer(backbone, loading.trust_remote_code)
    model = load_backbone(backbone, "encoder", loading, lora, quantization) if model is None else model
    settled = _settle(config or EncoderConfig(), backbone, tokenizer, is_causal(model))
    width = text_model(model).config.hidden_size
    if settled.dimensions is not None and settled.dimensions > width:
        raise InputError(f"dimensions must be at most the backbone's width {width}, got {settled.dimensions}")
    return Encoder(model, tokenizer, settled)


def is_causal(model: nn.Module) -> bool:
    """Whether tokens see only what stands before them, read off the attention layers."""
    flags = [module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)]
    return bool(flags) and all(flags)


def _settle(config: EncoderConfig, backbone: str, tokenizer: Any, causal: bool) -> EncoderConfig:
    found = _sentence_transformers_settings(Path(backbone))
    length = found.get("length") or min(tokenizer.model_max_length, DEFAULT_LENGTH)

    def first(*values: Any) -> Any:
        return next(value for value in values if value is not None)

    return replace(
        config,
        pooling=first(config.pooling, found.get("pooling"), "eos" if causal else "mean"),
        normalize=first(config.normalize, found.get("normalize"), True),
        dimensions=config.dimensions or found.get("dimensions"),
        query_prompt=first(config.query_prompt, found.get("query_prompt"), ""),
        passage_prompt=first(config.passage_prompt, found.get("passage_prompt"), ""),
        query_length=first(config.query_length, length),
        passage_length=first(config.passage_length, length),
    )


def _sentence_transformers_settings(folder: Path) -> dict[str, Any]:
    """Pooling, normalisation, prompts and length of a sentence-transformers folder; empty for any other backbone."""
    if not (folder / "modules.json").is_file():
        return {}
    settings: dict[str, Any] = {"normalize": False}
    for module in read_json(folder / "modules.json"):
        name = module["type"].rpartition(".")[2]
        path = folder / module["path"]
        if name == "Pooling":
            settings["pooling"] = _pooling_name(read_json(path / "config.json"), path)
        elif name == "Normalize":
            settings["normalize"] = True
        elif name == "Dense":
            settings["dimensions"] = _truncation(path)
        elif name != "Transformer":
            raise InputError(f"sentence-transformers module '{name}' cannot be trained here", folder / "modules.json")
    if (folder / "sentence_bert_config.json").is_file():
        settings["length"] = read_json(folder / "sentence_bert_config.json").get("max_seq_length")
    if (folder / "config_sentence_transformers.json").is_file():
        prompts = read_json(folder / "config_sentence_transformers.json").get("prompts") or {}
        settings["query_prompt"] = prompts.get("query")
        settings["passage_prompt"] = prompts.get("document", prompts.get("passage"))
    return settings


def _truncation(path: Path) -> int:
    """Dimensions that a Dense module keeps, if it is a plain truncation, as our exports write it."""
    weight = load_file(path / "model.safetensors")["linear.weight"]
    if not torch.equal(weight, torch.eye(*weight.shape)) or read_json(path / "config.json")["bias"]:
        raise InputError("a sentence-transformers module 'Dense' that is no truncation cannot be trained here", path)
    return len(weight)


def _pooling_name(config: dict[str, Any], path: Path) -> Pooling:
    names: dict[str, Pooling] = {"mean": "mean", "cls": "cls", "lasttoken": "last"}
    modes = {"mean_tokens": "mean", "cls_token": "cls", "lasttoken": "last"}
    if "pooling_mode" in config:
        found = [config["pooling_mode"]]
    else:
        prefix = "pooling_mode_"
        found = [key.removeprefix(prefix) for key, on in config.items() if key.startswith(prefix) and on]
    if len(found) == 1 and found[0] in names | modes:
        return (names | modes)[found[0]]  # type: ignore[return-value]
    raise InputError(f"pooling {' + '.join(found) or 'none'} is not available; use mean, cls or last token", path)
