import math
from pathlib import Path

import pytest
import torch

from lit_core.errors import InputError
from lit_core.merging import drift, drift_figure
from lit_core.merging.drift_report import layer_of
from tests.lit_core.merging.test_streaming import tensors, write

BASE = {"embed": torch.tensor([3.0, 4.0]), "h.0.w": torch.zeros(2), "h.0.b": torch.tensor([2.0]), "n": torch.arange(3)}
ONE = {**BASE, "embed": torch.tensor([3.0, 5.0]), "h.0.w": torch.tensor([1.0, 0.0])}
TWO = {**BASE, "embed": torch.tensor([4.0, 4.0]), "h.0.w": torch.tensor([1.0, 1.0]), "h.0.b": torch.tensor([3.0])}


def test_numbers_worked_out_by_hand() -> None:
    report = drift([ONE, TWO], BASE)
    embed, weight, bias = report.rows("tensor")
    assert embed == {
        "name": "embed", "numel": 2, "base_norm": 5.0, "ratios": {"model 0": 0.2, "model 1": 0.2},
        "cosines": {"model 0, model 1": 0.0},
    }  # fmt: skip
    assert weight["ratios"] == {"model 0": None, "model 1": None}  # the base is zero
    assert weight["cosines"]["model 0, model 1"] == pytest.approx(0.5**0.5)
    assert bias["ratios"] == {"model 0": 0.0, "model 1": 0.5}
    assert bias["cosines"] == {"model 0, model 1": None}  # one did not move
    names = [row["name"] for row in report.rows()]
    assert names == ["embed", "h.0"]
    layer = report.rows("layer")[1]
    assert layer["ratios"] == {"model 0": 0.5, "model 1": pytest.approx(3**0.5 / 2)}
    assert layer["cosines"]["model 0, model 1"] == pytest.approx(1 / 3**0.5)
    (whole,) = report.rows("model")
    assert whole["numel"] == 5
    assert whole["ratios"]["model 1"] == pytest.approx(2 / math.sqrt(29))
    with pytest.raises(InputError, match="field 'by': must be one of tensor, layer, model, got 'block'"):
        report.rows("block")  # type: ignore[arg-type]


def test_folders_are_as_state_dicts_and_as_a_plain_sum(tmp_path: Path) -> None:
    states, base = {f"m{seed}": tensors(seed, torch.bfloat16) for seed in range(3)}, tensors(9)
    folders = [write(tmp_path / name, state) for name, state in states.items()]
    read = drift(folders, write(tmp_path / "base", base), chunk_bytes=3000).rows("tensor")
    held = drift(states, base).rows("tensor")
    assert [row["name"] for row in held] == ["b.embed", "a.norm", "a.experts", "scalar", "empty", "coarse"]
    for row in held:
        (twin,) = [other for other in read if other["name"] == row["name"]]
        deltas = [(state[row["name"]].double() - base[row["name"]].double()).flatten() for state in states.values()]
        length = float(base[row["name"]].double().norm())
        for number, name in enumerate(states):
            ratio = float(deltas[number].norm()) / length if length else None
            for found in (row["ratios"][name], twin["ratios"][name]):
                assert found == (ratio if ratio is None else pytest.approx(ratio))
        cosine = float(torch.nn.functional.cosine_similarity(deltas[0], deltas[2], dim=0)) if row["numel"] else None
        for found in (row["cosines"]["m0, m2"], twin["cosines"]["m0, m2"]):
            assert found == (cosine if cosine is None else pytest.approx(cosine))


def test_layers_have_names() -> None:
    names = {
        "model.layers.12.self_attn.q_proj.weight": "model.layers.12",
        "encoder.layer.0.output.dense.bias": "encoder.layer.0",
        "h.3.w": "h.3",
        "0.auto_model.w": "0",
        "model.embed_tokens.weight": "model.embed_tokens",
        "2_Dense/linear.weight": "2_Dense/linear",
        "scale": "scale",
    }
    assert {name: layer_of(name) for name in names} == names


def test_figures_show_every_cell() -> None:
    report = drift({"a": ONE, "b": TWO}, BASE)
    ratios = drift_figure(report, by="tensor").axes[0]
    assert [text.get_text() for text in ratios.texts] == ["0.2", "0.2", "-", "-", "0", "0.5"]
    assert [label.get_text() for label in ratios.get_xticklabels()] == ["a", "b"]
    cosines = drift_figure(report, "cosine").axes[0]
    assert [label.get_text() for label in cosines.get_yticklabels()] == ["embed", "h.0"]
    assert [text.get_text() for text in cosines.texts] == ["0.00", "0.58"]
    with pytest.raises(InputError, match="a cosine needs two models"):
        drift_figure(drift([ONE], BASE), "cosine")
    with pytest.raises(InputError, match="need at least one model"):
        drift([], BASE)
    with pytest.raises(InputError, match="model 0 has no tensor 'embed'"):
        drift([{}], BASE)
