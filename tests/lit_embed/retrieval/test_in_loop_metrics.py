import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor
from two_ranks import become_two_ranks, run_program

from lit_core.errors import InputError
from lit_embed.functional.metrics import ranked_gains
from lit_embed.retrieval.evaluate import evaluate
from lit_embed.retrieval.index import search
from lit_embed.retrieval.metrics import RetrievalMetrics
from lit_embed.retrieval.ranking import Qrels, Run, tie_ranks, to_run

NAMES = ("ndcg@10", "mrr@10", "recall@100", "map", "precision@5")


def collection() -> tuple[Tensor, Tensor, Run, Qrels]:
    """Ranked gains ``(37, 120)``, all gains, and the same as run and qrels; scores tie, some queries have no answer."""
    generator = torch.Generator().manual_seed(0)
    doc_ids, query_ids = [f"d{number}" for number in range(300)], [f"q{number}" for number in range(37)]
    corpus = torch.randint(-1, 2, (300, 4), generator=generator).float()  # small integers: many ties
    queries = torch.randint(-2, 3, (37, 4), generator=generator).float()
    judged = torch.rand(37, 300, generator=generator).topk(9).indices
    gains = torch.randint(0, 4, (37, 9), generator=generator)
    gains[::10] = 0
    judged[:, 7:] = torch.where(torch.arange(37).unsqueeze(1) % 2 == 0, -1, judged[:, 7:])
    gains[judged < 0] = 0
    scores, indices = search(queries, corpus, 120, tie_rank=tie_ranks(doc_ids))
    qrels = {
        query_id: {doc_ids[doc]: gain for doc, gain in zip(*row, strict=True) if doc >= 0}
        for query_id, *row in zip(query_ids, judged.tolist(), gains.tolist(), strict=True)
    }
    return ranked_gains(indices, judged, gains), gains, to_run(scores, indices, query_ids, doc_ids), qrels


def test_equals_reported_metrics_whatever_the_batches() -> None:
    gains, all_gains, run, qrels = collection()
    expected = evaluate(run, qrels, NAMES)
    for size in (1, 8, 37):
        metrics = RetrievalMetrics(NAMES)
        for start in range(0, 37, size):
            metrics.update(gains[start : start + size], all_gains[start : start + size])
        values = {name: value.item() for name, value in metrics.compute().items()}
        assert values == pytest.approx(expected, abs=1e-6)
    assert expected["ndcg@10"] > 0


def test_reset_and_half_precision_keep_the_sums() -> None:
    gains, all_gains, _, _ = collection()
    metrics = RetrievalMetrics()
    metrics.update(gains, all_gains)
    before = metrics.compute()
    metrics.half()
    assert {name: value.item() for name, value in metrics.compute().items()} == {
        name: value.item() for name, value in before.items()
    }
    metrics.reset()
    metrics.update(gains[:1], torch.zeros(1, 3))
    assert list(metrics.compute()) == ["ndcg@10", "mrr@10", "recall@100"]
    assert metrics.compute()["recall@100"] == 0


def test_bad_arguments() -> None:
    for name in ("dcg@10", "precision", "ndcg@0"):
        with pytest.raises(InputError, match=f"unknown metric '{name}'"):
            RetrievalMetrics([name])
    with pytest.raises(ValueError, match=r"need \(Q, K\) and \(Q, R\), got \(2, 3\) and \(1, 3\)"):
        RetrievalMetrics().update(torch.zeros(2, 3), torch.zeros(1, 3))


@pytest.mark.slow
def test_two_processes_with_uneven_shares_equal_one(tmp_path: Path) -> None:
    ended = run_program(__file__, tmp_path, timeout=120)
    assert ended.returncode == 0, ended.stderr
    gains, all_gains, run, qrels = collection()
    metrics = RetrievalMetrics(NAMES)
    metrics.update(gains, all_gains)
    single = {name: value.item() for name, value in metrics.compute().items()}
    for rank in "01":
        assert json.loads((tmp_path / rank).read_text()) == single  # integers add up the same in any order
    assert single == pytest.approx(evaluate(run, qrels, NAMES), abs=1e-6)


def work(folder: str) -> None:
    """Score 29 queries in three batches in the first process and 8 in one in the second."""
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    gains, all_gains, _, _ = collection()
    metrics = RetrievalMetrics(NAMES)
    for start, end in [(0, 5), (5, 20), (20, 29)] if rank == 0 else [(29, 37)]:
        metrics.update(gains[start:end], all_gains[start:end])
    Path(folder, str(rank)).write_text(json.dumps({name: value.item() for name, value in metrics.compute().items()}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    become_two_ranks(work, sys.argv[1])
