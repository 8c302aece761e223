"""The head that regresses hidden image patches in CoCoA's first stage (card section 2.1; MoCa's, on which it builds).

One more decoder layer, which sees all tokens, then a linear map from each hidden image token to the pixels of its
patches. The head is thrown away after the stage.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import Generator, Tensor, nn

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_embed.modules.bridge_attention import text_decoder


class ImageReconstruction(nn.Module):
    """Pixels of hidden image tokens from the final states of a sequence.

    The layer starts as a copy of the middle layer of the language model, without adapters; the map from normal weights
    and a bias of 0. Both are float32, whatever the model's dtype, and read states of any.

    Args:
        model: A transformers vision-language model (Qwen2-VL, Qwen2.5-VL), plain or with adapters.
        init_std: Standard deviation of the map's weights.
        seed: Of these weights.

    Raises:
        InputError: The model has no vision tower, or its layers are quantised, so that they cannot be copied.
    """

    def __init__(self, model: nn.Module, init_std: float = 0.02, seed: int = 0) -> None:
        super().__init__()
        pixels = pixels_per_token(model)
        self.layer = _middle_layer(text_decoder(model))
        self.projection = nn.Linear(text_decoder(model).config.hidden_size, pixels, device="meta")
        device = next(self.layer.parameters()).device
        self.projection.to_empty(device="cpu")
        nn.init.normal_(self.projection.weight, std=init_std, generator=Generator().manual_seed(seed))
        nn.init.zeros_(self.projection.bias)
        self.projection.to(device)

    def forward(
        self, states: Tensor, mask: Tensor, position_embeddings: tuple[Tensor, Tensor], hidden: Tensor
    ) -> Tensor:
        """Predicted pixels, to be compared with the normalised ones by ``masked_patch_loss``.

        Args:
            states: Final states ``(B, L, D)`` of rows whose hidden patches were overwritten before the vision tower.
            mask: Additive ``(B, 1, L, L)``, that of :func:`lit_embed.functional.masks.bidirectional`.
            position_embeddings: Of the rows, from :func:`position_embeddings`.
            hidden: Bool ``(B, L)``, True = hidden image token.

        Returns:
            ``(n, merge_size**2 * pixels of a patch)``, patch after patch, row by row.
        """
        dtype = self.projection.weight.dtype
        cosine, sine = position_embeddings
        output = self.layer(
            states.to(dtype), attention_mask=mask.to(dtype), position_embeddings=(cosine.to(dtype), sine.to(dtype))
        )
        return self.projection((output[0] if isinstance(output, tuple) else output)[hidden])


def position_embeddings(model: nn.Module, states: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines that a model rotates by, for positions ``(B, L)`` or ``(3, B, L)``."""
    return text_decoder(model).rotary_emb(states, position_ids)


def pixels_per_token(model: nn.Module) -> int:
    """Numbers in the patches behind one image token: 4 x 1,176 for Qwen2-VL.

    Raises:
        InputError: The model has no vision tower.
    """
    config = unwrap(model).config
    vision = getattr(config, "vision_config", None)
    if vision is None:
        raise InputError(f"image reconstruction needs a vision-language model, got one of type {config.model_type}")
    patch = vision.temporal_patch_size * vision.in_channels * vision.patch_size**2
    return vision.spatial_merge_size**2 * patch


def _middle_layer(decoder: Any) -> nn.Module:
    """A trainable float32 copy of the middle layer's own weights, with sdpa attention."""
    index = len(decoder.layers) // 2
    source = decoder.layers[index]
    config = deepcopy(decoder.config)
    config._attn_implementation = "sdpa"  # a mask is given, which not every implementation takes
    with torch.device("meta"):  # nothing is drawn: all of it is overwritten
        layer = type(source)(config, index)
    found = {name.replace(".base_layer", ""): value for name, value in source.state_dict().items()}
    weights = {}
    for name, wanted in layer.state_dict().items():
        value = found.get(name)
        if value is None or value.shape != wanted.shape or not value.is_floating_point():
            raise InputError("image reconstruction copies a layer of the backbone, which must not be quantised")
        weights[name] = value.detach().to(torch.float32, copy=True)
    layer.load_state_dict(weights, assign=True)
    return layer
