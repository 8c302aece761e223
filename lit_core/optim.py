"""Parameter groups, schedules and clipping."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from lit_core.errors import InputError
from lit_core.sharding import full_tensor

ScheduleName = Literal["constant", "linear", "cosine", "inverse_sqrt", "polynomial", "cosine_with_restarts"]


@dataclass
class Schedule:
    """Learning-rate schedule, by the names of transformers.

    Args:
        name: Shape after the warm-up; all but ``constant`` and ``inverse_sqrt`` end at the last optimizer step.
        warmup_steps: Length of the linear warm-up in optimizer steps.
        warmup_ratio: Length of the warm-up as a share of all optimizer steps, used where ``warmup_steps`` is 0.
    """

    name: ScheduleName = "linear"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0


def parameter_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices decay as the optimizer says, vectors (norms, biases) do not.

    Raises:
        InputError: Nothing is trainable, as in a quantised backbone without adapters.
    """
    trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not trainable:
        raise InputError("nothing is trainable: a quantised backbone needs adapters, add --model.lora.r 16")
    matrices = [parameter for parameter in trainable if parameter.ndim > 1]
    vectors = [parameter for parameter in trainable if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_schedule(optimizer: Optimizer, schedule: Schedule, total_steps: float) -> LambdaLR:
    """A scheduler to be stepped once per optimizer step.

    Args:
        optimizer: Its learning rates are the peak values.
        schedule: Shape and warm-up.
        total_steps: Optimizer steps of the whole run; infinite where nothing but the user or a budget ends it.

    Raises:
        InputError: The shape depends on the end of a run that has none.
    """
    from transformers import get_scheduler

    endless = math.isinf(total_steps)
    if endless and (schedule.warmup_ratio > 0 or schedule.name not in ("constant", "inverse_sqrt")):
        raise InputError(f"'{schedule.name}' depends on the end of the fit: set trainer.max_steps", field="schedule")
    total_steps = 1 if endless else int(total_steps)
    warmup = schedule.warmup_steps or round(schedule.warmup_ratio * total_steps)
    name = "constant_with_warmup" if schedule.name == "constant" else schedule.name
    return get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=max(total_steps, 1))


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scale the gradients so that their joint norm is at most ``max_norm``; None only measures.

    Works for plain and sharded (DTensor) parameters.

    Returns:
        The norm before clipping, shape ``()``.
    """
    kinds: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in parameters:
        if parameter.grad is not None:
            kinds[hasattr(parameter.grad, "full_tensor")].append(parameter.grad)
    plain, sharded = kinds
    norm = nn.utils.get_total_norm(plain)
    if sharded:
        norm = torch.hypot(norm, full_tensor(nn.utils.get_total_norm(sharded)).to(norm.device))
    if max_norm is not None:
        factor = (max_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in plain + [cast(Any, gradient).to_local() for gradient in sharded]:
            gradient.mul_(factor.to(gradient))
    return norm
