"""Optimizer steps that the trainer's ``global_step`` counts once an update, however many they are."""

from lightning.pytorch.core.optimizer import LightningOptimizer


def count_step(optimizer: LightningOptimizer) -> None:
    """Count a step that has been taken."""
    optimizer._on_before_step()
    optimizer._on_after_step()


def step_uncounted(optimizer: LightningOptimizer) -> None:
    """Take a step that is not counted."""
    before, after = optimizer._on_before_step, optimizer._on_after_step
    optimizer._on_before_step = optimizer._on_after_step = lambda: None
    try:
        optimizer.step()
    finally:
        optimizer._on_before_step, optimizer._on_after_step = before, after
