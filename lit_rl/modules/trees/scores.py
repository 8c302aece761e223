"""Scores of positions, computed at each step of the engine, a scalar a token."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_core.backbones import unwrap
from lit_core.errors import InputError
from lit_core.sharding import full_tensor
from lit_rl.functional.branching import branching_scores
from lit_rl.modules.trees.config import TreeConfig


class ScoreHook:
    """Step hook of the engine: ``entropy``, ``divergence`` and ``semantic_entropy`` of each step's distribution.

    Args:
        table: Unit embeddings of the tokens ``(V, D)``, see :func:`unit_embeddings`.
        config: Which variant.
    """

    def __init__(self, table: Tensor, config: TreeConfig) -> None:
        self.table, self.config = table, config

    def __call__(self, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        config = self.config
        return branching_scores(
            logits, self.table, config.top_k, config.variant, config.entropy_support, tokens, normalised=True
        )._asdict()


@torch.no_grad()
def unit_embeddings(model: nn.Module) -> Tensor:
    """Rows of a model's input-embedding table at length 1, float32 ``(V, D)``; a copy."""
    return F.normalize(full_tensor(unwrap(model).get_input_embeddings().weight.detach()).float(), dim=-1)


def check_table(table: Tensor, model: nn.Module) -> None:
    """Refuse the embeddings of another model.

    Raises:
        InputError: The shapes.
    """
    own = unwrap(model).get_input_embeddings().weight.shape
    if table.shape != own:
        raise InputError(
            f"the embedding table is not the policy's: {tuple(table.shape)}, the policy has {tuple(own)}",
            field="embeddings",
        )
