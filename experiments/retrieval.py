"""Arms that several retrieval experiments share: word rankers, and a trained stage turned into results."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_embed.methods.retriever import METRICS
from lit_embed.retrieval.evaluate import evaluate_per_query
from lit_embed.retrieval.ranking import Run
from lit_embed.retrieval.trec import write_run


class Ranker(Protocol):
    """A ranker of words."""

    def search(self, queries: Mapping[str, str], top_k: int = 100) -> Run:
        """Best documents of every query."""
        ...


def word_arm(setting: Setting, name: str, title: str, build: Callable[[dict[str, str]], Ranker], main: bool) -> Arm:
    """An arm that trains nothing and ranks by words."""

    def run(context: ArmContext) -> None:
        collection = setting.collection(context.folder, context.seed)
        found = build(collection.corpus).search(collection.queries, 1000)
        finish(context, found, collection.qrels)

    return Arm(name, title, run, main=main, seeded=False)


def rank_test_queries(
    context: ArmContext,
    cli: ExperimentCLI,
    extra: Mapping[str, float] | None = None,
    earlier: ExperimentCLI | None = None,
) -> None:
    """Rank the test queries by a fitted retriever and write the arm's results and curves.

    Args:
        context: The arm.
        cli: Its last fit.
        extra: Further metrics.
        earlier: The fit before, whose cost counts and whose own curves are kept.
    """
    fits = [cli] if earlier is None else [earlier, cli]
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
    module: Any = cli.model
    curves: dict[str, Any] = {}
    for path in (fit.folder / "curves.json" for fit in fits):
        curves |= read_json(path) if path.exists() else {}
    write_json(context.folder / "curves.json", curves)
    cost = {
        "tokens": float(sum(fit.throughput.tokens for fit in fits)),
        "steps": float(sum(fit.trainer.global_step for fit in fits)),
    }
    qrels = cli.datamodule.collection("test").qrels
    finish(context, module.runs[type(module).__name__], qrels, extra, cost)


def finish(
    context: ArmContext,
    run: Run,
    qrels: dict[str, dict[str, int]],
    extra: Mapping[str, float] | None = None,
    cost: Mapping[str, float] | None = None,
) -> None:
    """Evaluate a run and mark the arm as done."""
    write_run(context.folder / "run.trec", run, tag=context.arm)
    values = evaluate_per_query(run, qrels, METRICS)
    means = {metric: sum(found.values()) / len(found) for metric, found in values.items()}
    write_results(context.folder, {**means, **(extra or {})}, values, cost)


def exported(cli: ExperimentCLI, folder: Path) -> Path:
    """Export a fitted module once and return the folder; of a quantised one the adapter, which a backbone may be."""
    if not folder.exists():
        module: Any = cli.model
        module.export(folder, "merged" if module.quantization is None else "adapter")
    return folder
