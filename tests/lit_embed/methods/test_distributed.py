"""Two CPU processes (gloo) against one: the same global batches must give the same weights, metrics and runs."""

from pathlib import Path
from typing import Any

import distributed_worker as worker
import pytest
import torch
from two_ranks import run_program

from lit_core.presets import preset_config, preset_tokenizer
from lit_embed.modules.encoder import build_encoder

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from what ranx and datasets import
]

FITS = [
    "ddp",
    "ddp cached",
    "ddp bert",
    "ddp bert adapters",
    "ddp likelihood",
    "ddp likelihood both",
    "ddp language model",
    "ddp boom",
    "ddp boom cached",
    "fsdp",
    "fsdp uneven chunks",
    "fsdp cached",
    "fsdp tied likelihood",
    "fsdp untied likelihood",
    "fsdp likelihood adapters",
    "fsdp language model",
]
RESUMED = ["fsdp resumed", "fsdp adapters resumed"]
GATHERED = [f"gathered{kind} {split}" for kind in ("", " symmetric", " distilled") for split in (2, 3, 4)]


class Runs:
    """What two processes have written, and the same done here."""

    def __init__(self, folder: Path) -> None:
        from transformers import BertModel, LlamaForCausalLM

        torch.manual_seed(0)
        self.two, self.one, untied, still = (folder / name for name in ("two", "one", "untied", "still"))
        LlamaForCausalLM(preset_config("tiny-llama", tie_word_embeddings=False)).save_pretrained(untied)
        preset_tokenizer("tiny-llama").save_pretrained(untied)
        without = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}  # ranks draw their own dropout
        BertModel(preset_config("tiny-bert", **without)).save_pretrained(still)
        preset_tokenizer("tiny-bert").save_pretrained(still)
        for path in (self.two, self.one):
            path.mkdir()
        found = run_program(worker.__file__, self.two, untied, timeout=400)
        self.log = found.stdout + found.stderr
        self.scenarios = worker.scenarios(self.one, str(untied))

    def __call__(self, name: str) -> tuple[dict[str, Any], dict[str, Any]]:
        """Results of two processes and of one."""
        path = self.two / f"{name}.pt"
        if not path.exists():
            pytest.fail(f"'{name}' did not end on two processes:\n{self.log[-5000:]}")
        return torch.load(path, weights_only=True), self.scenarios[name]()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"))


def _same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=0, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", FITS)
def test_two_steps_end_with_the_same_weights(runs: Runs, name: str) -> None:
    """Clipping is on, and the second step depends on the momentum of the first."""
    two, one = runs(name)
    _same(two["weights"], one["weights"])
    torch.testing.assert_close(two["grad_norm"], one["grad_norm"], rtol=1e-4, atol=0)
    assert float(one["grad_norm"]) > 0


@pytest.mark.parametrize("name", RESUMED)
def test_a_sharded_checkpoint_is_gone_on_from(runs: Runs, name: str) -> None:
    two, one = runs(name)
    _same(two["weights"], one["weights"])
    _same(two["resumed"], two["weights"], tolerance=0)
    _same(one["resumed"], one["weights"], tolerance=0)


@pytest.mark.parametrize("name", GATHERED)
def test_gathered_loss_and_gradient_are_those_of_one_batch(runs: Runs, name: str) -> None:
    """Also where ranks hold 4 queries and 1, share documents, and a closed group's negative lies on the other rank."""
    two, one = runs(name)
    assert two["loss"] == pytest.approx(one["loss"], abs=2e-6)
    torch.testing.assert_close(two["gradient"], one["gradient"], rtol=1e-5, atol=1e-6)


def test_gathering_without_gradient_is_not_exact(runs: Runs) -> None:
    two, one = runs("gathered without gradient")
    torch.testing.assert_close(two["exact"], one["exact"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one["constant"], one["exact"], rtol=0, atol=0)  # alone there is nothing to gather
    assert float((two["constant"] - one["exact"]).norm() / one["exact"].norm()) > 0.01


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_metrics_inside_the_loop_are_those_of_one_process(runs: Runs, strategy: str) -> None:
    two, one = runs(f"{strategy} validation")
    assert {"val/ndcg@10", "val/mrr@10", "val/recall@100", "val/loss"} <= one["metrics"].keys()
    retrieval = {key: value for key, value in one["metrics"].items() if key != "val/loss"}
    _same({key: two["metrics"][key] for key in retrieval}, retrieval)
    assert 0 < float(retrieval["val/ndcg@10"]) < 1


def test_scores_of_tasks_are_those_of_one_process(runs: Runs) -> None:
    two, one = runs("ddp boom validation")
    assert {"val/mean_task", "val/in_domain", "val/out_of_domain", "val/travel-retrieval/ndcg@10"} <= one[
        "metrics"
    ].keys()
    _same(two["metrics"], one["metrics"], tolerance=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_runs_are_those_of_one_process(runs: Runs, strategy: str) -> None:
    two, one = runs(f"{strategy} ranking")
    assert one["runs"].keys() == {"LLMQL", "QL re-ranking of BM25"}
    for name, run in one["runs"].items():
        assert two["runs"][name].keys() == run.keys()
        for query_id, scores in run.items():
            assert two["runs"][name][query_id] == pytest.approx(scores, abs=1e-4)


def test_a_sharded_checkpoint_is_exported_whole(runs: Runs) -> None:
    two, one = runs("fsdp export")
    assert (two["sharded"], one["sharded"]) == (True, False)
    texts = ["the 42", "a vessel"]
    found, expected = (build_encoder(str(folder / "export")).encode(texts, "query") for folder in (runs.two, runs.one))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
