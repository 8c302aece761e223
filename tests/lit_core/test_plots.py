import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from lit_core.plots import COLOURS, bar_with_intervals, curves, differences, file_name, write_figures

pytestmark = pytest.mark.slow  # matplotlib and TensorBoard


@pytest.fixture
def report() -> dict[str, Any]:
    def arm(name: str, per_seed: list[float], ci95: list[float] | None) -> dict[str, Any]:
        metric = {"mean": sum(per_seed) / len(per_seed), "ci95": ci95, "per_seed": per_seed}
        return {"name": name, "title": name.upper(), "metrics": {"mrr@10": metric}}

    claim = {"text": "a beats b", "metric": "mrr@10", "arm": "a", "baseline": "b", "larger_is_better": True}
    claims = [
        {**claim, "difference": 0.2, "ci95": [0.1, 0.3], "holds": True},
        {**claim, "difference": 0.0, "ci95": None, "holds": "inconclusive"},
    ]
    arms = [arm("a", [0.5, 0.7], [0.4, 0.8]), arm("b", [0.3], None)]
    return {"arms": arms, "claims": claims, "table_metrics": ["mrr@10", "absent"]}


def test_bars_show_the_numbers_of_the_report(report: dict[str, Any]) -> None:
    axes = bar_with_intervals(report, "mrr@10").axes[0]
    assert [text.get_text() for text in axes.texts] == ["0.600 [0.400, 0.800]", "0.300"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["A", "B"]
    (interval,) = axes.lines  # one arm has one
    assert list(interval.get_xdata()) == [0.4, 0.8]
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # the first arm on top
    with pytest.raises(ValueError, match="no arm has the metric 'loss'"):
        bar_with_intervals(report, "loss")


def test_small_differences_are_seen_beside_large_ones(report: dict[str, Any]) -> None:
    first = {**report["claims"][0], "ci95": [-0.03, 0.05], "difference": 0.01}
    large = {**first, "difference": 4.0, "ci95": [1.0, 7.0]}
    alike, unlike = (differences({"claims": claims}).axes[0] for claims in ([first, first], [first, large]))
    assert (alike.get_xscale(), unlike.get_xscale()) == ("linear", "symlog")

    def place(value: float) -> float:
        return float(unlike.transAxes.inverted().transform(unlike.transData.transform((value, 0)))[0])

    assert place(0.05) - place(-0.03) > 0.01
    assert place(7.0) - place(1.0) < 0.5


def test_differences_show_the_verdicts(report: dict[str, Any]) -> None:
    texts = [text.get_text() for text in differences(report).axes[0].texts]
    assert texts == ["+0.200 [+0.100, +0.300]\nholds", "+0.000\ninconclusive"]
    with pytest.raises(ValueError, match="no claims"):
        differences({"claims": []})


def test_curves_average_the_seeds_where_all_of_them_reach() -> None:
    runs = {"A": [[[0, 0.0], [10, 1.0], [20, 2.0]], [[0, 2.0], [20, 2.0], [30, 9.0]]]}
    axes = curves(runs, "train/loss").axes[0]
    assert axes.lines[0].get_xydata().tolist() == [[0, 1.0], [10, 1.5], [20, 2.0]]
    assert axes.texts[0].get_text() == "A"
    with pytest.raises(ValueError, match="arm 'A' has no points"):
        curves({"A": [[]]}, "train/loss")


def test_labels_of_equal_lines_do_not_cover_one_another() -> None:
    axes = curves({f"arm {k}": [[[0, 0.0], [1, 1.0 + k / 1000]]] for k in range(6)}, "val/mrr@10").axes[0]
    heights = sorted(text.get_position()[1] for text in axes.texts)
    assert all(b - a >= 0.06 for a, b in itertools.pairwise(heights))
    assert heights[-1] <= 1.0


def test_files_and_events(report: dict[str, Any], tmp_path: Path) -> None:
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "curves.json").write_text(json.dumps({"val/mrr@10": [[0, 0.1], [5, 0.2]]}))
    for _ in range(2):  # the second report replaces the first
        names = write_figures(tmp_path, report, {"A": [tmp_path / "a"], "B": [tmp_path / "b"]}, ["val/mrr@10", "x"])
    assert names == {
        "mrr@10": "mrr_10.png",
        "claims": "claims.png",
        "val/mrr@10 over training": "val_mrr_10_over_training.png",
    }
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in names.values())
    assert len(list((tmp_path / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["images"]) == {f"report/{name}" for name in names}
    for caption, name in names.items():
        (image,) = events.Images(f"report/{caption}")
        assert image.encoded_image_string == (tmp_path / name).read_bytes()
        with Image.open(tmp_path / name) as picture:
            assert ((image.width, image.height), picture.mode) == (picture.size, "RGBA")


def test_an_arm_has_the_same_colour_in_every_figure(report: dict[str, Any]) -> None:
    axes = curves({"B": [[[0, 0.1], [5, 0.2]]]}, "val/mrr@10", colours={"A": COLOURS[0], "B": COLOURS[1]}).axes[0]
    assert axes.lines[0].get_color() == COLOURS[1]
    assert file_name("val/ndcg@10") == "val_ndcg_10"
