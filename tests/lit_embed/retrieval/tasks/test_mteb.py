"""Exported models run in mteb, on tasks built from local data, and get the scores that our own tasks give."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict
from sentence_transformers import SentenceTransformer

from lit_core.backbones import BackboneConfig
from lit_embed.data.families import FamiliesConfig, build_families
from lit_embed.methods.boom import Boom
from lit_embed.retrieval.tasks import EvalTask, Retrieval, Sts

mteb = pytest.importorskip("mteb", reason="needs the package mteb")
pytestmark = pytest.mark.filterwarnings("ignore")  # of another package


def metadata(task: EvalTask, kind: str, main: str) -> Any:
    from mteb.abstasks.task_metadata import TaskMetadata

    return TaskMetadata(
        name="Local" + "".join(part.title() for part in task.name.replace("_", "-").split("-")),
        type=kind, main_score=main, description="Built-in texts.", reference=None,
        dataset={"path": "local", "revision": "1"}, category="t2t", eval_splits=["test"], eval_langs=["eng-Latn"],
        date=("2026-01-01", "2026-01-02"), dialect=[], domains=[], task_subtypes=[], license="cc-by-4.0",
        annotations_creators="derived", modalities=["text"], sample_creation="created", bibtex_citation="",
    )  # fmt: skip


def retrieval(task: Retrieval) -> Any:
    from mteb.abstasks import AbsTaskRetrieval

    class Local(AbsTaskRetrieval):  # type: ignore[misc]
        metadata = metadata(task, "Retrieval", "ndcg_at_10")

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            def side(texts: Any) -> Any:
                return Dataset.from_list([{"id": text_id, "text": text} for text_id, text in texts.items()])

            judged = {query: dict(of) for query, of in task.qrels.items()}
            split = {"corpus": side(task.passages), "queries": side(task.queries), "relevant_docs": judged,
                     "top_ranked": None}  # fmt: skip
            self.dataset = {"default": {"test": split}}
            self.data_loaded = True

    return Local()


def similarity(task: Sts) -> Any:
    from mteb.abstasks import AbsTaskSTS

    class Local(AbsTaskSTS):  # type: ignore[misc]
        metadata = metadata(task, "STS", "cosine_spearman")
        min_score, max_score = 0, 3

        def load_data(self, num_proc: int | None = None, **kwargs: Any) -> None:
            rows = [{"sentence1": task.queries[a], "sentence2": task.queries[b], "score": gold}
                    for a, b, gold in task.pairs]  # fmt: skip
            self.dataset = DatasetDict({"test": Dataset.from_list(rows)})
            self.data_loaded = True

    return Local()


@pytest.mark.slow
def test_scores_equal_those_of_mteb(tmp_path: Path) -> None:
    method = Boom("nano-qwen3", loading=BackboneConfig(dtype="float32"))
    method.configure_model()
    method.eval()
    method.export(tmp_path / "model")
    model = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    tasks = build_families(FamiliesConfig(rows=800, base_rows=20, test_queries=20)).test
    for task in tasks:
        if not isinstance(task, Retrieval | Sts):
            continue
        with torch.no_grad():
            sides = [
                dict(zip(texts, method.encoder.encode(list(texts.values()), kind, progress=False), strict=True))
                if texts else {}
                for texts, kind in ((task.queries, "query"), (task.passages, "passage"))
            ]  # fmt: skip
        ours = task.score(*sides)[task.main]
        other = retrieval(task) if isinstance(task, Retrieval) else similarity(task)
        found = mteb.evaluate(model, other, cache=None, show_progress_bar=False)
        theirs = found.task_results[0].get_score()
        assert ours == pytest.approx(theirs, abs=1e-3), task.name  # mteb rounds
