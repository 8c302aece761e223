import pytest
import torch
from torch import nn

from lit_core.packed import packed_linears


@torch.no_grad()
def test_packed_layers_give_the_same_and_are_undone() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False))
    inputs = torch.randn(3, 5, 24)
    before = model(inputs)
    with packed_linears(model):
        assert "forward" in vars(model[0])
        torch.testing.assert_close(model(inputs), before, atol=1e-5, rtol=1e-5)
    assert "forward" not in vars(model[0])
    model[0].weight.zero_()
    with packed_linears(model):  # laid out anew: no weights of the last block remain
        torch.testing.assert_close(model(inputs), model[2](model[1](model[0].bias.expand(3, 5, -1))))


def test_layers_are_restored_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(RuntimeError), packed_linears(model):
        model(torch.zeros(2, 3))
    assert "forward" not in vars(model[0])


def test_other_dtypes_and_subclasses_are_left_alone() -> None:
    class Own(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(4, 4).bfloat16(), Own(4, 4))
    with packed_linears(model):
        assert all("forward" not in vars(layer) for layer in model)
