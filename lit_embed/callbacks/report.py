"""What evaluation leaves behind: runs in TREC format, results, and one table of the trained model beside BM25."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lit_core.files import write_json
from lit_core.results import write_results
from lit_embed.methods.retriever import METRICS
from lit_embed.retrieval.bm25 import BM25
from lit_embed.retrieval.evaluate import evaluate_per_query
from lit_embed.retrieval.trec import write_qrels, write_run


class RetrievalReport(Callback):
    """Files and table of an evaluation.

    After ``test``: ``run.<name>.trec``, ``qrels.trec``, ``results.json`` and the table. After ``validate``:
    ``validation.json`` with the logged metrics.

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
            collection = vars(trainer)["datamodule"].collection("validate")
            row = {metric: values[f"val/{metric}"] for metric in METRICS}
            _print_table(
                f"{collection.name}: {len(collection.qrels)} validation queries", {type(pl_module).__name__: row}
            )

    @rank_zero_only
    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module: Any = pl_module
        collection = vars(trainer)["datamodule"].collection("test")
        bm25 = BM25(collection.corpus).search(collection.queries, module.top_k)
        rows: dict[str, dict[str, dict[str, float]]] = {}
        for name, run in {"BM25": bm25, **module.runs}.items():
            write_run(self.folder / f"run.{name.replace(' ', '_')}.trec", run, tag=name.replace(" ", "_"))
            rows[name] = evaluate_per_query(run, collection.qrels, METRICS)
        write_qrels(self.folder / "qrels.trec", collection.qrels)
        means = {name: {m: sum(v.values()) / len(v) for m, v in row.items()} for name, row in rows.items()}
        ours = type(module).__name__
        flat = {f"{name}/{metric}": value for name, row in means.items() for metric, value in row.items()}
        write_results(self.folder, {**means[ours], **flat}, rows[ours])
        _print_table(f"{collection.name}: {len(collection.qrels)} test queries", means)


def _print_table(title: str, rows: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("", *METRICS, title=title, title_justify="left")
    for name, values in rows.items():
        table.add_row(name, *(f"{values[metric]:.4f}" for metric in METRICS))
    Console().print(table)
