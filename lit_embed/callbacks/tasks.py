"""What runs on several tasks leave behind: which rows a member was trained on, and scores by task."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_core.files import write_json
from lit_core.results import write_results
from lit_embed.data.bagging import write_manifest
from lit_embed.retrieval.tasks import EvalTask


class MemberRecord(Callback):
    """Writes ``member.json``: the bag, and for each set its rows, how many were drawn, and their hashes.

    A checkpoint holds the same; where a run goes on, both are checked.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path, manifest = self.folder / "member.json", vars(trainer)["datamodule"].manifest
        if trainer.ckpt_path:
            write_manifest(path, manifest)  # which refuses to go on with other rows
        else:
            write_json(path, manifest)


class TaskReport(Callback):
    """Scores of every task.

    After ``test``: ``results.json`` with the means and main scores, ``scores.json`` with all scores, and a table.
    After ``validate``: ``validation.json`` with the logged metrics, and the table.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            write_json(self.folder / "validation.json", {n: float(v) for n, v in trainer.callback_metrics.items()})
            self._print("validation", _tasks(trainer, "validate", pl_module), pl_module)

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        tasks = _tasks(trainer, "test", module)
        write_json(self.folder / "scores.json", module.task_scores)
        main = {f"{task.name}/{task.main}": module.task_scores[task.name][task.main] for task in tasks}
        write_results(self.folder, {**module.task_means, **main})
        self._print("test", tasks, pl_module)

    @staticmethod
    def _print(title: str, tasks: list[EvalTask], module: Any) -> None:
        from rich.console import Console
        from rich.table import Table

        if not tasks:
            return
        table = Table("task", "domain", "score", "", title=f"{title}: {len(tasks)} tasks", title_justify="left")
        for task in tasks:
            table.add_row(task.name, task.domain, f"{module.task_scores[task.name][task.main]:.4f}", task.main)
        for name, value in module.task_means.items():
            table.add_row(name, "", f"{value:.4f}", "", style="bold")
        Console().print(table)


def _tasks(trainer: Trainer, stage: str, module: Any) -> list[EvalTask]:
    """The tasks that were scored; others were not encoded whole."""
    tasks = [found.task for found in vars(trainer)["datamodule"].evaluation(stage)]
    return [task for task in tasks if task.name in module.task_scores]
