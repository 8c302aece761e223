from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging import merge


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in (("a", (3, 4)), ("b", (5,)))}
    return {**weights, "count": torch.arange(4), "mask": torch.tensor([True, False])}


def loop(
    models: list[dict[str, Tensor]], weights: list[float], base: dict[str, Tensor] | None
) -> dict[str, list[float]]:
    """Element by element in Python's float64: an average without a base, task arithmetic with one."""
    merged = {}
    for key in ("a", "b"):
        rows = [model[key].double().flatten().tolist() for model in models]
        start = [0.0] * len(rows[0]) if base is None else base[key].double().flatten().tolist()
        factors = [w / sum(weights) for w in weights] if base is None else weights
        merged[key] = [
            start[i] + sum(w * (row[i] - start[i] * (base is not None)) for w, row in zip(factors, rows, strict=True))
            for i in range(len(start))
        ]
    return merged


def test_numbers_worked_out_by_hand() -> None:
    one, two, base = ({"w": torch.tensor(values)} for values in ([4.0, 0.0], [0.0, 8.0], [1.0, 2.0]))
    assert merge([one, two], "linear")["w"].tolist() == [2, 4]
    assert merge([one, two], "linear", [3, 1])["w"].tolist() == [3, 2]
    assert merge([one, two], "task_arithmetic", base=base)["w"].tolist() == [3, 6]  # 1 + 3 - 1, 2 - 2 + 6
    assert merge([one, two], "task_arithmetic", [0.5, 1], base)["w"].tolist() == [1.5, 7]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_merging_is_a_loop_in_float64(method: str, dtype: torch.dtype) -> None:
    models, base = [state(seed, dtype) for seed in range(3)], state(9, dtype)
    kept = [{key: tensor.clone() for key, tensor in model.items()} for model in [*models, base]]
    weights = [0.7, -0.2, 0.9]
    merged = merge(models, method, weights, base if method == "task_arithmetic" else None)
    expected = loop(models, weights, base if method == "task_arithmetic" else None)
    for key, values in expected.items():
        assert merged[key].dtype == dtype
        wide = torch.tensor(values, dtype=torch.float64)
        close = {"rtol": torch.finfo(dtype).eps, "atol": 1e-15 if dtype == torch.float64 else 1e-6}
        torch.testing.assert_close(merged[key].flatten().double(), wide, **close)
    assert torch.equal(merged["count"], torch.arange(4))
    for model, before in zip([*models, base], kept, strict=True):
        assert all(torch.equal(model[key], before[key]) for key in before)


def test_sums_are_taken_in_float64_whatever_the_type() -> None:
    models = [{"w": torch.tensor([256.0], dtype=torch.bfloat16)}] + [{"w": torch.ones(1, dtype=torch.bfloat16)}] * 8
    zero = {"w": torch.zeros(1, dtype=torch.bfloat16)}
    assert merge(models, "task_arithmetic", base=zero)["w"].item() == 264  # in bfloat16 256 + 1 is 256
    small = [{"w": torch.tensor([value])} for value in (2.0**24, 1.0, 1.0)]
    assert merge(small, "linear", normalize=False)["w"].item() == 2**24 + 2  # in float32 2^24 + 1 is 2^24


def test_models_have_one_type_unless_that_of_the_result_is_named() -> None:
    models = [{"w": torch.tensor([1.0])}, {"w": torch.tensor([2.0], dtype=torch.bfloat16)}]
    with pytest.raises(InputError, match=r"'w' has the types torch.float32 and torch.bfloat16; name the dtype"):
        merge(models, "linear")
    for dtype in ("float16", torch.float16):
        mixed = merge(models, "linear", dtype=dtype)["w"]
        assert (mixed.dtype, mixed.item()) == (torch.float16, 1.5)
    over = merge(models[:1], "task_arithmetic", base=models[1])["w"]  # a base may be coarser: deltas survive
    assert (over.dtype, over.item()) == (torch.float32, 1.0)
    with pytest.raises(InputError, match="field 'dtype': must be a floating type such as float32 or bfloat16"):
        merge(models, "linear", dtype="int8")


def test_a_model_merged_with_itself_is_itself() -> None:
    one, base = state(1), state(2)
    for merged in (merge([one] * 3, "linear", [1, 5, 2]), merge([one, one], "task_arithmetic", [0.5, 0.5], base)):
        torch.testing.assert_close(merged, one)
    assert merge([one], "task_arithmetic", [0], base)["a"].tolist() == base["a"].tolist()


def test_tied_weights_are_merged_once_and_stay_tied() -> None:
    models: list[Any] = []
    for seed in (1, 2):
        weight = state(seed)["a"]
        models.append({"embed": weight, "head": weight, "other": weight.clone()})
    merged = merge(models, "linear")
    assert merged["embed"].data_ptr() == merged["head"].data_ptr()
    assert merged["embed"].data_ptr() != merged["other"].data_ptr()
    models[1]["head"] = models[1]["head"].clone()  # the same in another place, as after a load
    again = merge(models, "linear")
    assert again["embed"].data_ptr() == again["head"].data_ptr()
    models[1]["head"] += 1
    for order in (models, models[::-1]):
        with pytest.raises(InputError, match="tensor 'head' is tied to 'embed'"):
            merge(order, "linear")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"b": None}, "model 1 has no tensor 'b'"),
        ({"c": torch.ones(1)}, "model 1 has a tensor 'c' that the others lack"),
        ({"b": torch.ones(4)}, r"tensor 'b' has the shapes \(5,\) and \(4,\)"),
        ({"b": torch.ones(5, dtype=torch.int64)}, "tensor 'b' has the types torch.float32 and torch.int64"),
        ({"count": torch.ones(4, dtype=torch.int64)}, "tensor 'count' holds whole numbers"),
        ({"mask": torch.tensor([True, True])}, "tensor 'mask' holds whole numbers"),
    ],
)
def test_models_that_do_not_fit(change: dict[str, Any], told: str) -> None:
    other = {key: value for key, value in {**state(2), **change}.items() if value is not None}
    with pytest.raises(InputError, match=told):
        merge([state(1), other], "linear")


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"method": "soup"}, "field 'method': must be one of linear, slerp, .*, got 'soup'"),
        ({"method": "task_arithmetic"}, "needs the base"),
        ({"weights": [1.0]}, "field 'weights': need a finite number for each of 2 models"),
        ({"weights": [1.0, float("nan")]}, "finite"),
        ({"weights": [1.0, -1.0]}, "divides by the sum of the weights, which is 0"),
        ({"weights": "ab"}, "field 'weights': need numbers, got 'ab'"),
        ({"models": []}, "at least one model"),
        ({"normalise": True}, "field 'normalise': linear does not know this option; it has normalize"),
        ({"normalize": 1}, "field 'normalize': must be true or false, got 1"),
        ({"chunk_bytes": 0}, "field 'chunk_bytes': must be at least 1"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        merge(**{"models": [state(1), state(2)], "method": "linear", **arguments})
