"""What every method's LightningModule shares: optimiser, schedule, clipping, checkpoints that know their method."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lit_core.errors import InputError
from lit_core.optim import Schedule, build_schedule, clip_gradients, parameter_groups
from lit_core.sharding import average_gradients

METHOD_KEY = "lit_method"
INSTANTIATOR = "_instantiator"  # lightning's key for who turns saved arguments into an object


class Method(LightningModule):
    """Base of all methods.

    Args:
        optimizer: Builds the optimizer from parameter groups.
        schedule: Learning-rate schedule over the run's optimizer steps.
        max_grad_norm: Gradients are scaled down to this norm; None never. (The trainer's own clipping is refused under
            manual optimisation, which some methods need.)
    """

    def __init__(self, optimizer: OptimizerCallable, schedule: Schedule, max_grad_norm: float | None) -> None:
        super().__init__()
        if max_grad_norm is not None and not max_grad_norm > 0:
            raise InputError(f"max_grad_norm must be above 0, got {max_grad_norm}")
        self.optimizer, self.schedule, self.max_grad_norm = optimizer, schedule, max_grad_norm

    def export(self, output: Path, form: str = "merged") -> None:
        """Write a folder that the ecosystem loads.

        Args:
            output: Folder to write.
            form: ``merged`` weights, or the ``adapter`` alone.

        Raises:
            InputError: The method has nothing to export in this form.
        """
        raise InputError(f"{type(self).__name__} has nothing to export")

    def no_sync(self) -> AbstractContextManager[None]:
        """Backward passes inside do not reduce gradients, as DDP would at each one; ``average_gradients`` follows."""
        model = self.trainer.strategy.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = self.optimizer(parameter_groups(self))
        schedule = build_schedule(optimizer, self.schedule, self.trainer.estimated_stepping_batches)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_fit_start(self) -> None:
        """Transformers loads models in evaluation mode, and lightning leaves modes alone."""
        self.train()

    def on_train_start(self) -> None:
        """Give the training loader the position that a checkpoint has.

        To tell how many steps an epoch has, lightning sets the loader up before it reads the checkpoint, and would then
        begin the epoch anew.
        """
        self.trainer.fit_loop._load_combined_loader_states()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        if self.device_mesh is not None:
            average_gradients(self.parameters())  # of what is not sharded
        norm = clip_gradients((p for group in optimizer.param_groups for p in group["params"]), self.max_grad_norm)
        self.log("train/grad_norm", norm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Name the method, and leave frozen weights out: the backbone they came from still holds them."""
        checkpoint[METHOD_KEY] = type(self).__name__
        settings = checkpoint.get(self.CHECKPOINT_HYPER_PARAMS_KEY)
        if settings and INSTANTIATOR not in settings:  # not built by the command line
            checkpoint[self.CHECKPOINT_HYPER_PARAMS_KEY] = _plain(settings)
        if self.device_mesh is None:  # a sharded checkpoint is read back name by name, and must be whole
            frozen, quantised, state = self._frozen(), self._quantised(), checkpoint["state_dict"]
            checkpoint["state_dict"] = {
                name: value for name, value in state.items() if name not in frozen and not name.startswith(quantised)
            }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        check_method(checkpoint, type(self).__name__)
        missing = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        own = self.state_dict()
        state = checkpoint.setdefault("state_dict", own)  # a sharded checkpoint was read already
        missing -= state.keys()
        if missing:
            raise InputError(f"the checkpoint lacks {len(missing)} trained weights, such as '{min(missing)}'")
        quantised = self._quantised()
        for name in self._frozen():
            if not name.startswith(quantised):
                state.setdefault(name, own[name])

    def _frozen(self) -> set[str]:
        """Names of untrained weights, all names of those that several modules share."""
        named = self.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}

    def _quantised(self) -> tuple[str, ...]:
        """Prefixes of what bitsandbytes' layers hold, packed weights and constants."""
        named = self.named_modules(remove_duplicate=False)
        return tuple(f"{name}." for name, module in named if type(module).__module__.startswith("bitsandbytes."))


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a method as the command line saves them: no classes, so that ``weights_only`` loading takes them.

    A function that builds the optimizer cannot be saved; a loaded method has the default one.
    """
    values = {name: value for name, value in settings.items() if not callable(value)}
    plain = {name: asdict(cast(Any, value)) if is_dataclass(value) else value for name, value in values.items()}
    return {**plain, INSTANTIATOR: "lightning.pytorch.cli.instantiate_module"}


def check_method(checkpoint: dict[str, Any], method: str, path: Path | str | None = None) -> None:
    """Refuse a checkpoint that another method wrote.

    Raises:
        InputError: The method that wrote it, and the one that reads it.
    """
    written_by = checkpoint.get(METHOD_KEY)
    if written_by != method:
        raise InputError(f"checkpoint was written by {written_by or 'an unknown program'}, not by {method}", path)
