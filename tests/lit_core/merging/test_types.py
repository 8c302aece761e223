"""Types of tensors: which are merged and which are copied, in memory and in folders."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging import merge, merge_folders
from lit_core.merging.model_folder import WEIGHTS
from tests.lit_core.merging.test_streaming import same, write

WHOLE = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64,
         torch.bool)  # fmt: skip
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def merged(folder: Path, states: list[dict[str, Tensor]], method: str = "linear", **options: Any) -> dict[str, Tensor]:
    """In folders, which has to be what is merged in memory."""
    parts = [write(folder / f"m{number}", state) for number, state in enumerate(states)]
    merge_folders(parts, folder / "out", method, **options)
    found = load_file(folder / "out" / WEIGHTS)
    assert same(found, merge(states, method, **options))
    return found


@pytest.mark.parametrize("dtype", WHOLE, ids=str)
def test_whole_numbers_are_copied_if_they_are_equal(tmp_path: Path, dtype: torch.dtype) -> None:
    most = 1 if dtype == torch.bool else torch.iinfo(dtype).max  # of 64 bits, which no float64 holds
    whole = torch.from_numpy(np.array([0, 1, 1, most, 1], dtype=str(dtype).removeprefix("torch.")))
    states = [{"n": whole.clone(), "w": torch.full((2,), float(number))} for number in (1, 3)]
    found = merged(tmp_path / "same", states)
    assert found["n"].dtype == dtype
    assert found["n"].tolist() == whole.tolist()
    assert found["w"].tolist() == [2, 2]
    states[1]["n"] = torch.tensor([0, 1, 0, 0, 1]).to(dtype)
    told = rf"tensor 'n' holds whole numbers \({dtype}\) that are not equal in all models"
    with pytest.raises(InputError, match=told):
        merge(states, "linear")
    folders = [write(tmp_path / f"m{number}", state) for number, state in enumerate(states)]
    with pytest.raises(InputError, match=told):
        merge_folders(folders, tmp_path / "out", "linear")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_floats_of_any_size_are_merged_and_rounded_once(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = [torch.tensor([1.0, -2.0, 0.5, 0.0]), torch.tensor([2.0, 4.0, 0.5, 0.0]), torch.tensor([2.0, 1.0, 2.0, 0.0])]
    states = [{"w": row.to(dtype)} for row in rows]  # exact in every type
    (found,) = merged(tmp_path / "linear", states).values()
    assert found.dtype == dtype
    mean = torch.stack(rows).double().mean(0)  # 5/3 and 1 are between steps of the small types
    close = 1e-15 if dtype == torch.float64 else 0.0  # which has no steps to round to
    torch.testing.assert_close(found.double(), mean.to(dtype).double(), rtol=close, atol=0)
    base = {"w": torch.tensor([1.0, 1.0, 0.5, 0.0]).to(dtype)}
    (over,) = merge(states, "ties", base=base, density=0.5).values()
    # of deltas (0, -3, 0, 0), (1, 3, 0, 0), (1, 0, 1.5, 0) two each are kept; the second entry's sum of 0 elects plus
    assert over.double().tolist() == [2, 4, 2, 0]


def test_sums_of_half_types_are_those_of_float64_after_rounding() -> None:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float16, torch.bfloat16):
        rows = torch.randn(5, 20_000, generator=generator).to(dtype)
        states = [{"w": row} for row in rows]
        weights = torch.rand(5, generator=generator, dtype=torch.float64)  # decimal ones meet halves of steps exactly
        weights = (weights / weights.sum()).tolist()
        found = merge(states, "linear", weights)["w"]
        expected = (rows.double() * torch.tensor(weights, dtype=torch.float64)[:, None]).sum(0)
        assert float((found.double() - expected).abs().max()) <= float(expected.abs().max()) * torch.finfo(dtype).eps
        assert float((found != expected.to(dtype)).double().mean()) < 1e-3  # where float64 is at a border
        wide = merge(states, "linear", weights, dtype=torch.float64)["w"]
        torch.testing.assert_close(wide, expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_largest_values_of_a_half_type_are_finite(dtype: torch.dtype) -> None:
    most = torch.finfo(dtype).max  # their sum is none of the type, and of bfloat16 none of float32
    states = [{"w": torch.full((64,), most, dtype=dtype)} for _ in range(3)]
    assert merge(states, "linear")["w"].tolist() == [most] * 64
    base = {"w": torch.zeros(64, dtype=dtype)}
    assert merge(states, "ties", base=base, density=1.0, weights=[0.25, 0.25, 0.5])["w"].tolist() == [most] * 64


def test_the_manifest_counts_types_before_and_after(tmp_path: Path) -> None:
    one = {"a": torch.ones(2), "b": torch.ones(2), "n": torch.arange(3), "f": torch.tensor([True])}
    two = {**one, "b": torch.ones(2, dtype=torch.bfloat16)}
    folders = [write(tmp_path / "one", one), write(tmp_path / "two", two)]
    told = merge_folders(folders, tmp_path / "out", "linear", dtype="float16")
    assert told["dtypes"] == {
        "before": [{"float32": 2, "int64": 1, "bool": 1}, {"float32": 1, "bfloat16": 1, "int64": 1, "bool": 1}],
        "after": {"float16": 2, "int64": 1, "bool": 1},
    }
