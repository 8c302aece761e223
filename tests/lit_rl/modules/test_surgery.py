"""Combined gradients against projections written out, on one process and on two."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import surgery_worker as worker
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM

from lit_core.presets import preset_config
from lit_rl.functional.surgery import draw_orders
from lit_rl.modules.granularity import partition
from lit_rl.modules.surgery import GradientSurgery

ROOT = Path(__file__).parents[3]
GRANULARITIES = ("param", "linear", "block", "layer", "global")


def projected(gradients: list[Tensor], orders: list[list[int]]) -> Tensor:
    """PCGrad as its definition has it."""
    total = torch.zeros_like(gradients[0])
    for own, others in enumerate(orders):
        left = gradients[own].clone()
        for other in others:
            dot, square = left @ gradients[other], gradients[other] @ gradients[other]
            if dot < 0 and square > 0:
                left -= dot / square * gradients[other]
        total += left
    return total


def separate(model: nn.Module, losses: list[Tensor]) -> list[list[Tensor]]:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    found = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for loss in losses]
    return [[torch.zeros_like(p) if g is None else g for p, g in zip(parameters, row, strict=True)] for row in found]


def expected(model: nn.Module, gradients: list[list[Tensor]], granularity: Any, orders: Tensor) -> list[Tensor]:
    """Combined gradient of each parameter: parts flattened and projected."""
    split = partition(model, granularity)
    found: list[Tensor] = [torch.empty(0)] * len(split.parameters)
    for part in range(len(split.parts)):
        places = [place for place, owner in enumerate(split.index) if owner == part]
        flat = [torch.cat([row[place].flatten() for place in places]) for row in gradients]
        whole = projected(flat, orders[part].tolist())
        for place, piece in zip(places, whole.split([gradients[0][place].numel() for place in places]), strict=True):
            found[place] = piece.view_as(gradients[0][place])
    return found


def language_model(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(preset_config("nano-qwen3")).to(dtype).train()


def token_losses(model: nn.Module, domains: int) -> list[Tensor]:
    """Losses that share nothing but the weights; the last domain sees less of the vocabulary."""
    generator = torch.Generator().manual_seed(2)
    ids = [torch.randint(1000 // (1 + domain), (2, 6), generator=generator) for domain in range(domains)]
    return [model(input_ids=rows, labels=rows.flip(0)).loss for rows in ids]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("domains", [2, 3])
def test_the_literal_projection(granularity: Any, domains: int) -> None:
    model = language_model()
    losses = token_losses(model, domains)
    gradients = separate(model, losses)
    surgery = GradientSurgery(model, [str(number) for number in range(domains)], granularity)
    surgery.gradients.check_in_step(["0"])  # nothing is sharded
    for number, loss in enumerate(losses):
        with surgery.gradients.record(str(number)):
            loss.backward()  # type: ignore[no-untyped-call]
    surgery.finish(7)
    orders = draw_orders(7, len(surgery.split.parts), domains)
    for parameter, value in zip(surgery.split.parameters, expected(model, gradients, granularity, orders), strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, value, atol=1e-10, rtol=0)
    assert surgery.weights is not None
    assert granularity == "global" or (surgery.weights != 1).any()


@pytest.mark.parametrize("domains", [2, 3])
def test_global_is_pcgrad_bit_for_bit(domains: int) -> None:
    """Where no operation rounds: entries of one size, so that squared norms are powers of two."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2), nn.Linear(2, 1, bias=False)).double()
    parameters = list(model.parameters())
    sizes = [parameter.numel() for parameter in parameters]
    assert sum(sizes) == 16
    generator, bent = torch.Generator().manual_seed(0), 0
    for step in range(20):
        signs = torch.randint(2, (domains, 16), generator=generator).double() * 2 - 1
        gradients = list(signs * torch.tensor([1.0, 2, 4])[:domains, None])
        surgery = GradientSurgery(model, list("abc"[:domains]), "global")
        for name, gradient in zip("abc", gradients, strict=False):
            pieces = zip(parameters, gradient.split(sizes), strict=True)
            with surgery.gradients.record(name):
                torch.stack([(parameter.flatten() * piece).sum() for parameter, piece in pieces]).sum().backward()
        surgery.finish(step)
        flat = torch.cat([parameter.grad.flatten() for parameter in parameters if parameter.grad is not None])
        assert torch.equal(flat, projected(gradients, draw_orders(step, 1, domains)[0].tolist()))
        bent += not torch.equal(flat, sum(gradients, torch.zeros(())))
    assert bent >= 5


def test_losses_that_share_a_graph() -> None:
    """The example of the docstring, and a loss that misses a part of the model."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)).double()
    outputs = model(torch.randn(3, 4).double())
    losses = [outputs[:, 0].mean(), -outputs.square().mean(), model[0].weight.square().sum()]
    gradients = separate(model, losses)
    surgery = GradientSurgery(model, ["a", "b", "c"], "linear", order="fixed")
    surgery.backward(dict(zip("abc", losses, strict=True)))
    orders = torch.tensor([[[1, 2], [0, 2], [0, 1]]] * 2)
    for parameter, value in zip(model.parameters(), expected(model, gradients, "linear", orders), strict=True):
        torch.testing.assert_close(parameter.grad, value, atol=1e-12, rtol=0)
    with pytest.raises(ValueError, match="unknown domain 'd'"):
        surgery.backward({"d": losses[0]})


def test_several_micro_batches_are_one_step() -> None:
    """With several passes a domain, and checkpointing; without a conflict it is the plain gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    inputs = torch.randn(8, 4)

    def loss(rows: slice, sign: float, recompute: bool = False) -> Tensor:
        hidden = checkpoint(model[:2], inputs[rows], use_reentrant=False) if recompute else model[:2](inputs[rows])
        return sign * model[2](hidden).sum()

    found = []
    for recompute in (False, True):
        surgery = GradientSurgery(model, ["a", "b"])
        surgery.backward({"a": loss(slice(0, 2), 1, recompute), "b": loss(slice(4, 8), -2, recompute)}, last=False)
        assert model[0].weight.grad is None
        surgery.backward({"a": loss(slice(2, 4), 1, recompute)})
        found.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    whole = GradientSurgery(model, ["a", "b"])
    whole.backward({"a": loss(slice(0, 4), 1), "b": loss(slice(4, 8), -2)})
    for parameter, one, other in zip(model.parameters(), *found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(one, parameter.grad, atol=1e-6, rtol=1e-6)
        torch.testing.assert_close(other, parameter.grad, atol=1e-6, rtol=1e-6)
    agreeing = GradientSurgery(model, ["a", "b"])
    agreeing.backward({"a": loss(slice(0, 4), 1), "b": loss(slice(0, 4), 1)})
    combined = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    loss(slice(0, 4), 2).backward()  # type: ignore[no-untyped-call]
    for parameter, value in zip(model.parameters(), combined, strict=True):
        torch.testing.assert_close(value, parameter.grad, atol=1e-6, rtol=1e-6)


def test_sixteen_bits_are_summed_in_float32() -> None:
    """A hundred small gradients after a large one: bfloat16 would lose them all."""
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    surgery = GradientSurgery(model, ["a", "b"])
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    surgery.backward({"a": (256 * model(one)).sum()}, last=False)
    for _ in range(100):
        surgery.backward({"a": (0.5 * model(one)).sum()}, last=False)
    surgery.backward({"b": (2 * model(one)).sum()})
    assert model.weight.grad is not None
    assert model.weight.grad.dtype == torch.bfloat16
    assert surgery.gram is not None
    assert surgery.gram[0].tolist() == [[306.0**2, 612], [612, 4]]
    assert float(model.weight.grad) == 308


def test_clipping_and_adam_see_the_combined_gradient() -> None:  # card, Ex 2
    gradients = torch.tensor([[1.0, 2, 3, 0], [2, 1, -4, 1]], dtype=torch.float64)
    for granularity, expected_norm, clipped in (
        ("param", 4.5762, [0.655572, 0.655572, 0.038563, 0.372776]),
        ("sum", 4.4721, [0.670820, 0.670820, -0.223607, 0.223607]),
    ):
        model = nn.ParameterDict({name: nn.Parameter(torch.zeros(2, dtype=torch.float64)) for name in ("m1", "m2")})
        surgery = GradientSurgery(model, ["a", "b"], method="sum" if granularity == "sum" else "pcgrad")
        flat = torch.cat([model["m1"], model["m2"]])
        surgery.backward({"a": flat @ gradients[0], "b": flat @ gradients[1]})
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        assert float(norm) == pytest.approx(expected_norm, abs=1e-4)
        found = torch.cat([p.grad for p in model.parameters() if p.grad is not None])
        torch.testing.assert_close(found, torch.tensor(clipped).double(), atol=1e-6, rtol=0)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.0)
        optimizer.step()
        state = torch.cat([optimizer.state[p]["exp_avg"] for p in model.parameters()])
        torch.testing.assert_close(state, 0.1 * found)
        step = torch.cat([p.detach() for p in model.parameters()])
        torch.testing.assert_close(step, -0.1 * found.sign(), atol=1e-6, rtol=0)  # MGS turns the third around


def test_gradvac_remembers_and_forgets_what_is_not_finite() -> None:
    model = nn.Linear(2, 1, bias=False)
    surgery = GradientSurgery(model, ["a", "b"], method="gradvac")
    weight = model.weight[0]
    surgery.backward({"a": weight[0], "b": weight.sum()})
    assert surgery.cosines is not None
    mean = float(surgery.cosines[0, 0, 1])
    assert mean == pytest.approx(0.5 / 2**0.5)
    weight = model.weight[0]
    surgery.backward({"a": weight[0], "b": weight[1]})  # a cosine of 0 is below the mean
    assert surgery.weights is not None
    assert (surgery.weights > 1).all()
    weight = model.weight[0]
    surgery.backward({"a": weight[0], "b": weight[1] * torch.nan})
    assert surgery.cosines.isfinite().all()


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("two")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", worker.__file__, str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=200, check=False
    )
    if done.returncode:
        pytest.fail(done.stdout[-2000:] + done.stderr[-4000:])
    return torch.load(folder / "found.pt", weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", worker.CASES)
def test_two_processes_have_the_gradient_of_one(two: dict[str, Any], name: str) -> None:
    """With unequal counts of domains on the ranks of DDP, and in step on those of FSDP2."""
    one = worker.run(*worker.CASES[name])
    for key, value in one["gradients"].items():
        torch.testing.assert_close(two[name]["gradients"][key], value, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(two[name]["gram"], one["gram"], atol=1e-6, rtol=1e-6)
    assert (one["weights"] != 1).any()


@pytest.mark.slow
def test_sharded_ranks_out_of_step_are_refused(two: dict[str, Any]) -> None:
    assert "['chat', 'if'] and ['chat', 'math']" in two["refused"]
