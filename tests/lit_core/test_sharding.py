"""One process; `tests/lit_embed/methods/test_distributed.py` runs two."""

import torch
from torch import nn

from lit_core import sharding


def test_every_function_is_the_identity_in_one_process() -> None:
    rows = torch.randn(3, 2, requires_grad=True)
    assert sharding.gather_rows(rows) is rows
    assert sharding.full_tensor(rows) is rows
    assert (sharding.world_size(), sharding.rank()) == (1, 0)
    assert (sharding.row_counts(3), sharding.row_offset(3), sharding.maximum(3)) == ([3], 0, 3)
    assert sharding.gather_objects({"a": 1}) == [{"a": 1}]
    assert sharding.share_of_mean(3) == 1.0
    parameter = nn.Parameter(torch.zeros(2))
    sharding.average_gradients([parameter])
    assert parameter.grad is None
