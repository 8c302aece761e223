"""CoCoA's stages on two CPU processes (gloo) against one: the same global batches give the same weights."""

import cocoa_worker as worker
import pytest
import torch
from torch import Tensor
from two_ranks import run_program

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning")]
Weights = dict[str, dict[str, Tensor]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Weights, Weights]:
    folder = tmp_path_factory.mktemp("two")
    found = run_program(worker.__file__, folder, timeout=500)
    assert found.returncode == 0, found.stderr[-3000:]
    two = torch.load(folder / "weights.pt", weights_only=True)
    return two, worker.scenarios(tmp_path_factory.mktemp("one"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", [*worker.STAGES, "cached"])
def test_two_processes_take_the_steps_of_one(runs: tuple[Weights, Weights], strategy: str, name: str) -> None:
    two, one = runs
    for key, value in one[f"auto {name}"].items():
        torch.testing.assert_close(two[f"{strategy} {name}"][key], value, atol=2e-5, rtol=1e-4, msg=key)


def test_a_sharded_fit_resumes(runs: tuple[Weights, Weights]) -> None:
    two, _ = runs
    for key, value in two["fsdp whole"].items():
        assert torch.equal(two["fsdp resumed"][key], value), key
