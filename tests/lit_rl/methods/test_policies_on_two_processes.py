"""Two CPU processes (gloo) against one: the same global batches must give the same weights, metrics and responses."""

from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from two_ranks import run_program

from lit_core.presets import preset_config, preset_tokenizer

pytestmark = pytest.mark.slow


class Runs:
    """What two processes have written, and the same done here."""

    def __init__(self, folder: Path) -> None:
        from transformers import Qwen3ForCausalLM

        self.two, self.one, untied = (folder / name for name in ("two", "one", "untied"))
        torch.manual_seed(0)
        Qwen3ForCausalLM(preset_config("nano-qwen3", tie_word_embeddings=False)).save_pretrained(untied)
        preset_tokenizer("nano-qwen3").save_pretrained(untied)
        for path in (self.two, self.one):
            path.mkdir()
            worker.problems(path)
        found = run_program(worker.__file__, self.two, untied, timeout=600)
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
    return Runs(tmp_path_factory.mktemp("two"))


def same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float = 2e-6) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(
            found[key], value, rtol=tolerance, atol=tolerance, msg=lambda text, key=key: f"{key}: {text}"
        )


@pytest.mark.parametrize("name", worker.FITS)
def test_three_updates_end_with_the_same_weights(runs: Runs, name: str) -> None:
    """Whitening and counts are global, ranks have different numbers of tokens and chunks, and clipping is on."""
    two, one = runs(name)
    same(two["weights"], one["weights"])
    same(two["logged"], one["logged"], tolerance=2e-5)
    assert two["steps"] == one["steps"] == 3


@pytest.mark.parametrize(
    "name", [f"{name} resumed" for name in ("fsdp grpo", "fsdp ppo", "fsdp adapters", "ddp ppo", "fsdp mgs")]
)
def test_a_checkpoint_is_gone_on_from(runs: Runs, name: str) -> None:
    two, one = runs(name)
    same(two["weights"], one["weights"])
    same(two["resumed"], two["weights"], tolerance=0)
    same(one["resumed"], one["weights"], tolerance=0)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_evaluation_is_that_of_one_process(runs: Runs, strategy: str) -> None:
    two, one = runs(f"{strategy} evaluated")
    assert two["texts"] == one["texts"]
    assert len(one["texts"]) == 6
    same(two["metrics"], one["metrics"], tolerance=1e-5)


def test_batches_without_a_signal_move_no_weight(runs: Runs) -> None:
    """Neither momentum nor decay, on any number of processes."""
    two, one = runs("ddp dull")
    same(two["weights"], one["weights"], tolerance=2e-5)  # Adam turns rounding into steps


def test_ranks_with_different_numbers_of_groups_go_on_together(runs: Runs) -> None:
    """Rank 0 has one group, rank 1 two; divided by what all of them would have in tokens."""
    two, one = runs("ddp uneven")
    same(two["weights"], one["weights"])
    assert two["steps"] == one["steps"] == 1
    assert runs("ddp uneven, three steps")[0]["steps"] == 1
