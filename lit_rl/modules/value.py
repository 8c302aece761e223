"""Value functions: a head on the policy's states, or a critic with a backbone of its own."""

from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, text_model, transformer_blocks, unwrap
from lit_core.sharding import shard
from lit_rl.modules.layout import Chunk
from lit_rl.modules.policy import drop_nothing, states_before


class ValueHead(nn.Module):
    """A number from a state; 0 at the start.

    Args:
        width: Length of a state.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, states: Tensor) -> Tensor:
        """Values ``(N,)`` in float32 of states ``(N, D)``."""
        return self.linear(states.to(self.linear.weight.dtype)).squeeze(-1).float()


class Critic(nn.Module):
    """A backbone of its own with a value head.

    Args:
        backbone: Preset, local folder or hub id.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
    """

    def __init__(
        self, backbone: str, loading: BackboneConfig, lora: Lora, quantization: Quantization | None = None
    ) -> None:
        super().__init__()
        self.model = load_backbone(backbone, "encoder", loading, lora, quantization)
        drop_nothing(self.model)
        self.head = ValueHead(unwrap(self.model).config.hidden_size)

    def shard(self, mesh: object) -> None:
        """Shard the backbone over the data-parallel ranks (FSDP2); the head stays whole."""
        shard(text_model(self.model), mesh, transformer_blocks(self.model))

    def forward(self, chunk: Chunk) -> Tensor:
        """Values of the states before each response token of a chunk ``(N,)``, float32."""
        return self.head(states_before(text_model(self.model), chunk))
