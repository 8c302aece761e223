"""Fits in one process: resuming in mid-epoch, checkpoints, learning, and what is logged."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from distributed_worker import LORA, SHORT, boom, dense, language_model, likelihood

from lit_core.backbones import Lora
from lit_core.module import Method
from lit_embed.methods.dense import Dense
from lit_embed.methods.llm_ql import LLMQL
from lit_embed.retrieval.evaluate import evaluate

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from what ranx and datasets import
]


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=2e-3)


DROPPING = Lora(r=4, dropout=0.3)
RESUMED: dict[str, Callable[[], Method]] = {
    "automatic": lambda: dense(lora=DROPPING),
    "cached": lambda: dense(lora=DROPPING, grad_cache=True),
    "dropout in the backbone": lambda: dense(backbone="tiny-bert"),
    "adam": lambda: dense(optimizer=adam),
    "likelihood": lambda: likelihood(direction="both", corruption_unit="token"),
    "likelihood, adapters": lambda: likelihood(lora=DROPPING),
    "language model": language_model,
    "several tasks": lambda: boom(lora=DROPPING),
}


@pytest.mark.parametrize("name", RESUMED)
def test_a_fit_resumed_in_mid_epoch_ends_bit_for_bit_alike(name: str, tmp_path: Path) -> None:
    build, path = RESUMED[name], tmp_path / "half.ckpt"
    whole = worker.fit(build(), tmp_path, "auto", 7, worker.SaveAt(path, 3))["weights"]  # an epoch has 5 steps
    torch.manual_seed(123)
    resumed = worker.fit(build(), tmp_path, "auto", 7, ckpt=path)["weights"]
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], value) for key, value in whole.items())
    halted = torch.load(path, weights_only=True)["state_dict"]
    assert any(not torch.equal(halted[key], value) for key, value in whole.items())


@pytest.mark.parametrize("build", [lambda **s: dense(grad_cache=True, **s), dense], ids=["cached", "automatic"])
def test_both_modes_take_the_same_steps(build: Callable[..., Method], tmp_path: Path) -> None:
    """Chunks of any size, one optimizer step a batch, the schedule moved on."""
    fine = replace(SHORT, chunk_tokens=50)
    found = worker.fit(build(encoder=fine), tmp_path, "auto", 3)
    expected = worker.fit(dense(), tmp_path, "auto", 3)
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=0, atol=1e-6)
    torch.testing.assert_close(found["grad_norm"], expected["grad_norm"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("build", [dense, likelihood], ids=["dense", "likelihood"])
def test_a_checkpoint_holds_the_adapters_alone_and_loads(build: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    module = build(lora=LORA)
    trained = worker.fit(module, tmp_path, "auto", 2, worker.SaveAt(path, 2))["weights"]
    saved = torch.load(path, weights_only=True)
    assert all(".lora_" in name for name in saved["state_dict"])
    loaded = type(module).load_from_checkpoint(path, weights_only=True)
    assert loaded.lora == LORA
    found = worker.weights(loaded)
    assert all(torch.equal(found[key], value) for key, value in trained.items())
    texts = ["the 42"]
    torch.testing.assert_close(loaded.encoder.encode(texts, "query"), module.encoder.encode(texts, "query"))


def test_metrics_inside_the_loop_are_those_of_the_report(tmp_path: Path) -> None:
    module: Any = dense()
    found = worker.validate(module, tmp_path, "auto")["metrics"]
    datamodule: Any = worker.data(module)
    datamodule.setup("validate")
    collection = datamodule.collection("validate")
    queries = module.encoder.encode(list(collection.queries.values()), "query")
    documents = module.encoder.encode(list(collection.corpus.values()), "passage")
    scores = (queries @ documents.T).tolist()
    run = {
        query_id: dict(zip(collection.corpus, row, strict=True))
        for query_id, row in zip(collection.queries, scores, strict=True)
    }
    for name, value in evaluate(run, collection.qrels, ["ndcg@10", "mrr@10", "recall@100"]).items():
        assert float(found[f"val/{name}"]) == pytest.approx(value, abs=1e-5)


def test_training_learns_the_training_pairs(tmp_path: Path) -> None:
    module: Any = dense(optimizer=adam)
    before = worker.validate(module, tmp_path, "auto")["metrics"]["val/loss"]
    losses: list[float] = []

    class Losses(worker.Callback):
        def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    worker.fit(module, tmp_path, "auto", 30, Losses())
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    assert float(before) > 0


def test_query_likelihood_logs_what_a_document_tells(tmp_path: Path) -> None:
    module: Any = likelihood()
    metrics = worker.validate(module, tmp_path, "auto")["metrics"]
    assert float(metrics["val/ql_gap"]) == pytest.approx(
        float(metrics["val/loss_shuffled"] - metrics["val/loss"]), abs=1e-5
    )
    assert isinstance(module, LLMQL)
    assert isinstance(module, Dense)
