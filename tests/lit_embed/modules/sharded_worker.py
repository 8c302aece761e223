"""Two ranks with a sharded vision-language encoder, for `test_multimodal_sharded.py` (by `torchrun`)."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn

from lit_core.backbones import Lora, transformer_blocks, unwrap
from lit_core.sharding import average_gradients, gather_rows, rank, shard
from lit_embed.items import Item
from lit_embed.modules.gradcache import cached_backward
from lit_embed.modules.multimodal import MultimodalEncoder, build_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig


class Stripes:
    """An image that depends on its number alone."""

    def __init__(self, number: int) -> None:
        self.key, self.number = str(number), number

    def load(self) -> Image.Image:
        rows = np.arange(56)[:, None, None] * self.number % 256
        return Image.fromarray(np.broadcast_to(rows, (56, 56, 3)).astype(np.uint8))


TEXTS = [Item("the man"), Item("a vessel of the kind that carries nine others over the river"), Item("and so")]
SHOWN = [Item("the man", Stripes(3)), Item("", Stripes(5)), Item("so it is said", Stripes(7)), Item("the")]


def build() -> MultimodalEncoder:
    """With adapters that are not zero, in chunks so small that ranks differ in how many they have."""
    encoder = build_multimodal_encoder(
        "tiny-qwen2_5-vl", MultimodalConfig(chunk_tokens=16), lora=Lora(r=2, dropout=0.0)
    )
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02, generator=generator)
    return encoder


def loss_of(vectors: Tensor) -> Tensor:
    """Couples all vectors."""
    return (vectors @ vectors.T).exp().mean()


def run(encoder: MultimodalEncoder, items: list[Item]) -> dict[str, Any]:
    """Vectors of these items, and the gradient of a loss over those of all ranks."""
    tokens = encoder.tokenize(items, "query")
    with torch.no_grad():
        vectors = encoder(tokens)
    cached_backward(encoder, tokens, lambda own: loss_of(gather_rows(own)))
    average_gradients(encoder.parameters())
    gradients = {}
    for name, parameter in encoder.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            whole = getattr(parameter.grad, "full_tensor", None)
            gradients[name] = (parameter.grad if whole is None else whole()).clone()
    return {"vectors": vectors, "gradients": gradients}


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    mesh = dist.device_mesh.init_device_mesh("cpu", (2, 1), mesh_dim_names=("data_parallel", "tensor_parallel"))
    encoder = build()
    shard(unwrap(encoder.model), mesh, transformer_blocks(encoder.model))
    encoder.equal_chunks = True
    torch.save(run(encoder, SHOWN if rank() else TEXTS), folder / f"{rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
