"""What the evaluation of a policy leaves behind: responses, results, and a table."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_core.files import write_json, write_jsonl
from lit_core.intervals import bootstrap_mean
from lit_core.results import write_results
from lit_rl.modules.evaluation import ProblemResult, per_problem, summarise


class PolicyReport(Callback):
    """Files and table of an evaluation.

    After ``test``: ``responses.jsonl``, ``results.json`` and the table. After ``validate``: ``validation.json`` with
    the logged metrics, and the table. After ``predict``: ``responses.jsonl``; every rank writes its own part, named
    ``responses.<rank>`` where there are several.

    Args:
        folder: Where to write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.predicted: list[ProblemResult] = []

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            values = {name: float(value) for name, value in trainer.callback_metrics.items()}
            write_json(self.folder / "validation.json", values)
            _print_table("validation problems", vars(pl_module)["results"])

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        results: list[ProblemResult] = vars(pl_module)["results"]
        write_jsonl(self.folder / "responses.jsonl", _rows(results))
        write_results(self.folder, summarise(results), per_problem(results))
        _print_table("test problems", results)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any, **kwargs: Any
    ) -> None:
        self.predicted += outputs

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        part = f".{trainer.global_rank}" if trainer.world_size > 1 else ""
        write_jsonl(self.folder / f"responses{part}.jsonl", _rows(self.predicted))
        self.predicted = []


def _rows(results: list[ProblemResult]) -> list[dict[str, Any]]:
    return [
        {"problem": result.id, "sample": number, "response": text, "reward": reward, "answer": answer}
        | ({"domain": result.domain} if result.domain else {})
        for result in results
        for number, (text, reward, answer) in enumerate(zip(result.texts, result.rewards, result.answers, strict=True))
    ]


def _print_table(title: str, results: list[ProblemResult]) -> None:
    from rich.console import Console
    from rich.table import Table

    items = per_problem(results)
    table = Table("metric", "mean", "95 % interval", title=f"{len(results)} {title}", title_justify="left")
    for name, value in summarise(results).items():
        interval = bootstrap_mean([items[name]]) if name in items and len(results) > 1 else None
        bounds = f"[{interval.low:.4f}, {interval.high:.4f}]" if interval else ""
        table.add_row(name, f"{value:.4f}", bounds)
    Console().print(table)
