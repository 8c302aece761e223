"""What an evaluation by Precision@1 leaves behind: results, and a table by task."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_core.files import write_json
from lit_core.results import write_results
from lit_embed.retrieval.precision import Precision


class PrecisionReport(Callback):
    """Files and table of an evaluation.

    After ``test``: ``results.json`` and the table. After ``validate``: ``validation.json`` with the logged metrics, and
    the table where tasks were evaluated.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_json(self.folder / "validation.json", values)
            _print(vars(pl_module)["precision"], "validation")

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        precision: Precision = vars(pl_module)["precision"]
        write_results(self.folder, precision.metrics(), precision.per_item())
        _print(precision, "test")


def _print(precision: Precision | None, part: str) -> None:
    if precision is None:
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("", "Precision@1", title=f"{len(precision.tasks)} {part} tasks", title_justify="left")
    for name, value in precision.metrics().items():
        table.add_row(name.removeprefix("p@1/"), f"{value:.4f}")
    Console().print(table)
