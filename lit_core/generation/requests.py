"""What is asked of an engine and what it answers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor

from lit_core.errors import InputError

FinishReason = Literal["stop", "length"]
StepHook = Callable[[Tensor, Tensor], dict[str, Tensor]]


@dataclass(frozen=True)
class Request:
    """One response to be drawn.

    Args:
        prompt: Token ids.
        seed: Seed of its draws; equal requests get equal responses, whatever runs beside them.
        prefix: First tokens of the response, to be continued; they count as its tokens.
    """

    prompt: Sequence[int]
    seed: int
    prefix: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.prompt:
            raise InputError("a prompt needs at least one token")


@dataclass
class Completion:
    """A response, its prefix left out.

    Args:
        tokens: Ids behind the prefix, the end token included.
        log_probs: Log-probability of each under the sampling temperature, float32 ``(T,)``, on the host.
        finish_reason: ``stop`` at an end token or a stop string, ``length`` at the most tokens.
        scalars: What the step hook has computed at each token, float32 ``(T,)`` each.
    """

    tokens: list[int]
    log_probs: Tensor
    finish_reason: FinishReason
    scalars: dict[str, Tensor] = field(default_factory=dict)
