"""The same numbers as mergekit, which is not a dependency; where it is installed."""

import importlib
from typing import Any

import pytest
import torch

from lit_core.merging import merge

WEIGHTS = [0.2, 0.5, 0.3]


@pytest.fixture(scope="module")
def mergekit() -> Any:
    try:
        found = importlib.import_module("mergekit.merge_methods")
    except ImportError as error:
        pytest.skip(f"mergekit is not installed ({error})")
    if not hasattr(found, "merge_tensors"):
        pytest.skip("this mergekit is older than 0.1.5 and has no merge_tensors")
    return found


@pytest.mark.parametrize(
    ("method", "weighted", "with_base", "ours", "theirs"),
    [
        ("linear", True, False, {}, {}),
        ("task_arithmetic", True, True, {"lam": 0.7}, {"lambda": 0.7}),
        ("slerp", False, False, {"t": 0.3}, {"t": 0.3}),
        ("multislerp", True, False, {}, {}),
        ("multislerp", True, True, {}, {}),
        ("karcher", False, False, {"iterations": 10}, {}),
        ("ties", True, True, {"density": 0.3}, {"density": 0.3}),
        ("sce", False, True, {"select_topk": 0.4}, {"select_topk": 0.4}),
        ("model_stock", False, True, {}, {}),
    ],
)
def test_a_method_gives_the_numbers_of_mergekit(
    mergekit: Any, method: str, weighted: bool, with_base: bool, ours: dict[str, Any], theirs: dict[str, Any]
) -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(40, 30, generator=generator, dtype=torch.float64)
    count = 2 if method == "slerp" else 3
    models = [base + 0.3 * torch.randn(40, 30, generator=generator, dtype=torch.float64) for _ in range(count)]
    inputs = [row.clone() for row in ([base, *models] if with_base else models)]
    parameters = {**theirs, "weight": WEIGHTS} if weighted else theirs
    index = 0 if with_base or method == "slerp" else None  # of SLERP the base is the first of the two models
    expected = mergekit.merge_tensors(inputs, method, parameters=parameters, base_index=index)
    states, root = [{"w": row} for row in models], {"w": base} if with_base else None
    found = merge(states, method, WEIGHTS if weighted else None, root, **ours)["w"]
    close = 1e-5 if method == "karcher" else 1e-7  # it ends before a step below 1e-5, and divides by norms plus 1e-8
    torch.testing.assert_close(found, expected, rtol=0, atol=close)
