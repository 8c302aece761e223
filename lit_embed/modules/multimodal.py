"""Images and texts to vectors: Qwen2-VL and Qwen2.5-VL as encoders (CoCoA, card sections 2.3 and 2.4)."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, load_tokenizer, text_model, unwrap
from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.images import ImageSettings, Patches, load_image_settings
from lit_core.packed import packed_linears
from lit_core.progress import track
from lit_core.sharding import full_tensor
from lit_embed.functional import masks
from lit_embed.functional.pooling import finish
from lit_embed.items import Item, Kind
from lit_embed.modules.chunks import ChunkedEncoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig, MultimodalTokenizer, VisionTokens
from lit_embed.modules.multimodal_tokens import MultimodalTokens, PaddedRows, Row

SETTINGS = "lit_multimodal.json"  # of an exported folder
LONGEST = 4096  # tokens of an item, where neither the user, the folder nor the tokenizer says less
FAMILIES = ("qwen2_vl", "qwen2_5_vl")
In = TypeVar("In")
Out = TypeVar("Out")


class MultimodalEncoder(ChunkedEncoder[MultimodalTokens]):
    """One tower for images, texts and both.

    The vector of an item is the last layer's state at its bridge token. It does not depend on what else is in the
    batch, nor on the side of the padding.

    Args:
        model: A Qwen2-VL or Qwen2.5-VL model of transformers, with a language-model head or without, or a peft model
            around it.
        tokenizer: Its fast tokenizer.
        images: How it wants its images.
        config: Settings, with nothing left open (see :func:`build_multimodal_encoder`).

    Raises:
        InputError: A token or a setting does not fit.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, images: ImageSettings, config: MultimodalConfig) -> None:
        super().__init__()
        self.model, self.config, self.tokenizer = model, config, tokenizer
        settings = text_model(model).config
        names = {"start": "vision_start", "end": "vision_end", "image": "image", "video": "video"}
        vision = VisionTokens(**{field: getattr(settings, f"{name}_token_id") for field, name in names.items()})
        self.item_tokenizer = MultimodalTokenizer(tokenizer, config, images, vision)
        if config.attention == "bidirectional" and settings._attn_implementation.startswith("flash"):
            raise InputError(
                "flash attention takes no mask that lets tokens see those behind them: set attention to sdpa"
            )

    @property
    def embedding_dimension(self) -> int:
        """Width of the vectors."""
        return self.config.dimensions or self.width

    @property
    def width(self) -> int:
        """Width of the token states."""
        return text_model(self.model).config.get_text_config().hidden_size

    @property
    def dtype(self) -> torch.dtype:
        """Type of the model's weights."""
        return text_model(self.model).dtype

    @property
    def image_token(self) -> int:
        """Id that stands for one token of an image."""
        return self.item_tokenizer.vision.image

    @property
    def never_hidden(self) -> set[int]:
        """Ids that reconstruction never hides: special ones, and those of images."""
        vision = self.item_tokenizer.vision
        return {*self.tokenizer.all_special_ids, vision.start, vision.end, vision.image, vision.video}

    @property
    def head_weight(self) -> Tensor:
        """Weight ``(vocabulary, width)`` of the language-model head, whole on every rank.

        Raises:
            InputError: The model was loaded without its head.
        """
        head = unwrap(self.model).get_output_embeddings()
        if head is None:
            raise InputError("the model was loaded without its language-model head")
        return full_tensor(head.weight)

    def tokenize(self, items: Sequence[Item], kind: Kind) -> MultimodalTokens:
        """Tokens and patches of items, prompt and bridge token included; cut texts are counted in a warning.

        Items with an unreadable image have no row where ``skip_unreadable`` is set.

        Raises:
            InputError: An image cannot be read or has too many tokens, or a text holds a special token of images.
        """
        return self.item_tokenizer(items, kind)

    def forward(self, tokens: MultimodalTokens) -> Tensor:
        """As :meth:`ChunkedEncoder.forward`; of a batch of which nothing could be read, ``(0, D)``."""
        if len(tokens):
            return super().forward(tokens)
        return super().forward(self._smallest().to(tokens.ids.device))[:0]  # a sharded rank stays in step

    def encode_chunk(self, tokens: MultimodalTokens, rows: Sequence[int]) -> Tensor:
        """Vectors of some of the rows in one padded forward pass."""
        padded, spare = self.pad_chunk(tokens, rows)
        vectors = self.encode_padded(padded)
        return vectors[:-1] + vectors[-1:].sum() * 0 if spare else vectors

    def pad_chunk(self, tokens: MultimodalTokens, rows: Sequence[int]) -> tuple[PaddedRows, bool]:
        """Some of the rows as a padded batch, and whether a spare row stands behind them, to be dropped.

        Where ranks run a sharded vision tower in step, one without an image runs it over a smallest one.
        """
        pad_id = self.tokenizer.pad_token_id
        if not self.equal_chunks or any(tokens.images[row] >= 0 for row in rows):
            return tokens.pad(rows, pad_id), False
        chosen = MultimodalTokens.concatenate([tokens.select(rows), self._smallest().to(tokens.ids.device)])
        return chosen.pad(range(len(chosen)), pad_id), True

    def embed(self, padded: PaddedRows) -> Tensor:
        """Input embeddings ``(B, L, width)``, images in their places."""
        model = text_model(self.model)
        embeds = model.get_input_embeddings()(padded.ids)
        if padded.pixels is None:
            return embeds
        features = model.get_image_features(padded.pixels, padded.grids, return_dict=True).pooler_output
        places = (padded.ids == self.image_token)[..., None]
        return embeds.masked_scatter(places, torch.cat(features).to(embeds.dtype))

    def encode_padded(self, padded: PaddedRows) -> Tensor:
        """Vectors of a padded batch, float32 ``(B, D)``; the same whatever else is in the batch."""
        hidden = self.states(padded, self.attention_mask(padded))
        pooled = hidden[torch.arange(len(hidden), device=hidden.device), padded.ends]
        return finish(pooled, self.config.dimensions, self.config.normalize is not False)

    def attention_mask(self, padded: PaddedRows) -> Tensor | None:
        """Additive mask ``(B, 1, L, L)`` of the encoder's own attention; None where plain causal attention is exact."""
        valid, dtype = padded.mask.bool(), text_model(self.model).dtype
        if self.config.attention == "bidirectional":
            return masks.bidirectional(valid, dtype=dtype)
        # no token sees the padding behind it: the faster kernels without a mask are exact
        return masks.causal(valid, dtype=dtype) if padded.left else None

    def states(self, padded: PaddedRows, mask: Tensor | None, **layout: Any) -> Tensor:
        """Last-layer states ``(B, L, width)`` under any attention, in the model's dtype.

        Args:
            padded: What is read; its pixels may be corrupted before.
            mask: Additive float mask ``(B, 1, L, L)``. None is causal attention, whatever the encoder's own is, without
                regard to padding on the left.
            **layout: Handed to every attention layer, those of the vision tower included.
        """
        inputs: dict[str, Any] = {"input_ids": padded.ids, "position_ids": padded.positions, "attention_mask": mask}
        if padded.pixels is not None:
            inputs |= {"pixel_values": padded.pixels, "image_grid_thw": padded.grids}
        return text_model(self.model)(**inputs, use_cache=False, **layout).last_hidden_state

    @torch.no_grad()
    def encode(self, items: Sequence[Item], kind: Kind, block: int = 64, progress: bool = True) -> Tensor:
        """Vectors of any number of items, in evaluation mode; items of equal text and image are encoded once.

        The next block's images are read while the present one is encoded.

        Args:
            items: The items.
            kind: Chooses the prompt.
            block: Items prepared at a time; bounds the memory (5 MB an image of 448 x 448 pixels).
            progress: Show a bar once this has taken two seconds.

        Returns:
            Float32 ``(N, D)`` on the CPU; zeros, which are similar to nothing, for items that were left out because
            their image cannot be read.

        Raises:
            InputError: As in :meth:`tokenize`.
        """
        distinct = {item.key: item for item in items}
        order = sorted(distinct.values(), key=lambda item: (item.image is not None, len(item.text)), reverse=True)
        vectors = torch.zeros(len(order), self.embedding_dimension)
        training = self.training
        self.eval()
        starts = range(0, len(order), block)
        title = {"query": "encoding queries", "passage": "encoding passages"}[kind]
        prepared = _ahead(lambda start: self.item_tokenizer.rows(order[start : start + block], kind), starts)
        cut = 0
        with packed_linears(self.model):
            for start, rows in zip(track(starts, title, unit="block") if progress else starts, prepared, strict=True):
                places = [start + place for place, row in enumerate(rows) if row is not None]
                cut += sum(row.cut for row in rows if row is not None)
                if places:
                    vectors[places] = self._encode_rows([row for row in rows if row is not None])
        self.train(training)
        self.item_tokenizer.say_cut(cut, len(order))
        place = {item.key: row for row, item in enumerate(order)}
        return vectors[torch.tensor([place[item.key] for item in items], dtype=torch.long)]

    def _encode_rows(self, rows: Sequence[Row]) -> Tensor:
        device = next(self.model.parameters()).device
        return self(self.item_tokenizer.pack(rows).to(device)).cpu()

    def _smallest(self) -> MultimodalTokens:
        """A row of a black image of one token."""
        settings, vision = self.item_tokenizer.images, self.item_tokenizer.vision
        pixels = torch.zeros(settings.merge**2, 3 * settings.frames * settings.patch**2)
        ids = [vision.start, vision.image, vision.end, self.item_tokenizer.bridge_id]
        image = Patches(pixels, (1, settings.merge, settings.merge))
        return self.item_tokenizer.pack([Row(ids, len(ids) - 1, image, 1)])


def build_multimodal_encoder(
    backbone: str,
    config: MultimodalConfig | None = None,
    loading: BackboneConfig | None = None,
    lora: Lora | None = None,
    quantization: Quantization | None = None,
    model: nn.Module | None = None,
) -> MultimodalEncoder:
    """Load a vision-language backbone with its tokenizer and settle what the configuration leaves open.

    Args:
        backbone: Preset, local folder (also one that was exported here), or hub id.
        config: Settings of the encoder.
        loading: Precision, attention, checkpointing.
        lora: Adapters to add; by default in both towers (:func:`lit_core.vision.default_targets`).
        quantization: Load in 8 or 4 bits.
        model: An already loaded model of that backbone, with a language-model head or without.

    Raises:
        InputError: What :func:`lit_core.backbones.load_backbone` raises, or a setting that does not fit.
    """
    loading = loading or BackboneConfig()
    tokenizer = load_tokenizer(backbone, loading.trust_remote_code)
    model = load_backbone(backbone, "encoder", loading, lora, quantization) if model is None else model
    kind = text_model(model).config.model_type
    if kind not in FAMILIES:
        raise InputError(f"backbone '{backbone}' is a {kind} model; images need one of {', '.join(FAMILIES)}")
    images = load_image_settings(backbone, loading.trust_remote_code)
    settled = _settle(config or MultimodalConfig(), backbone, tokenizer)
    encoder = MultimodalEncoder(model, tokenizer, images, settled)
    if settled.dimensions is not None and settled.dimensions > encoder.width:
        raise InputError(f"dimensions must be at most the backbone's width {encoder.width}, got {settled.dimensions}")
    return encoder


def _settle(config: MultimodalConfig, backbone: str, tokenizer: Any) -> MultimodalConfig:
    """The user's settings, then an exported folder's, then the defaults."""
    path = Path(backbone) / SETTINGS
    found = read_json(path)["encoder"] if path.is_file() else {}
    names = {field.name for field in fields(MultimodalConfig)}
    if unknown := sorted(found.keys() - names):
        raise InputError("this version knows no such setting", path, field=unknown[0])
    defaults = {
        "max_tokens": min(tokenizer.model_max_length, LONGEST),
        "image_size": 0,
        "attention": "bidirectional",
        "normalize": True,
        "query_prompt": "",
        "passage_prompt": "",
    }
    chosen: dict[str, Any] = {name: value for name, value in vars(config).items() if value is not None}
    return replace(config, **{**defaults, **{k: v for k, v in found.items() if v is not None}, **chosen})


def _ahead(prepare: Callable[[In], Out], inputs: Iterable[In]) -> Iterator[Out]:
    """``prepare`` of each input in order, the next one in the background while the present one is used."""
    with ThreadPoolExecutor(1) as pool:
        waiting = None
        for value in inputs:
            following = pool.submit(prepare, value)
            if waiting is not None:
                yield waiting.result()
            waiting = following
        if waiting is not None:
            yield waiting.result()
