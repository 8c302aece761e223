import pytest
import torch
from torch import nn

from lit_core.errors import InputError
from lit_core.optim import Schedule, build_schedule, clip_gradients, parameter_groups


def test_vectors_do_not_decay_and_frozen_weights_are_left_out() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1))
    module[2].requires_grad_(False)
    matrices, vectors = parameter_groups(module)
    assert [tuple(p.shape) for p in matrices["params"]] == [(3, 2)]
    assert "weight_decay" not in matrices
    assert [tuple(p.shape) for p in vectors["params"]] == [(3,), (3,), (3,)]
    assert vectors["weight_decay"] == 0.0


def test_decay_shrinks_matrices_alone() -> None:
    module = nn.Linear(2, 2)
    before = module.bias.detach().clone()
    optimizer = torch.optim.AdamW(parameter_groups(module), lr=0.1, weight_decay=0.5)
    weight = module.weight.detach().clone()
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(module.weight.detach(), weight * 0.95)  # 1 - 0.1 * 0.5
    torch.testing.assert_close(module.bias.detach(), before, rtol=0, atol=0)


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(InputError, match=r"nothing is trainable.*--model\.lora\.r"):
        parameter_groups(nn.Linear(1, 1).requires_grad_(False))


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        (Schedule("linear", warmup_steps=2), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (Schedule("linear", warmup_ratio=1 / 3), [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]),
        (Schedule("constant", warmup_steps=2), [0.0, 0.5, 1.0, 1.0, 1.0, 1.0, 1.0]),
        (Schedule("constant"), [1.0] * 7),
        (Schedule("cosine", warmup_steps=2), [0.0, 0.5, 1.0, 0.853553, 0.5, 0.146447, 0.0]),
    ],
)
def test_schedules_of_six_steps(schedule: Schedule, rates: list[float]) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = build_schedule(optimizer, schedule, total_steps=6)
    seen = []
    for _ in rates:
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert seen == pytest.approx(rates, abs=1e-6)


def _with_gradients() -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    return parameters


def test_clipping_scales_the_joint_norm() -> None:
    parameters = _with_gradients()
    assert float(clip_gradients(parameters, 1.0)) == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([0.6, 0.0]), atol=1e-6, rtol=0)
    torch.testing.assert_close(parameters[1].grad, torch.tensor([0.8]), atol=1e-6, rtol=0)
    assert parameters[2].grad is None


@pytest.mark.parametrize("limit", [None, 5.1])
def test_small_gradients_and_no_limit_change_nothing(limit: float | None) -> None:
    parameters = _with_gradients()
    assert float(clip_gradients(parameters, limit)) == pytest.approx(5.0)
    torch.testing.assert_close(parameters[0].grad, torch.tensor([3.0, 0.0]), atol=0, rtol=0)
    assert float(clip_gradients([nn.Parameter(torch.zeros(1))], limit)) == 0.0
