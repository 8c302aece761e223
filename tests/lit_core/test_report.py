import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from lit_core.report import (
    ArmResults,
    Claim,
    build_report,
    console_tables,
    format_count,
    format_interval,
    format_seconds,
    to_markdown,
    write_report,
)
from lit_core.results import Results


def run(values: list[float], loss: float = 1.0, **cost: float) -> Results:
    items = {f"q{index}": value for index, value in enumerate(values)}
    return Results({"mrr@10": sum(values) / len(values), "loss": loss}, {"mrr@10": items}, cost)


@pytest.fixture
def base() -> list[float]:
    return [random.Random(index).random() for index in range(100)]


@pytest.fixture
def arms(base: list[float]) -> list[ArmResults]:
    rng = random.Random(0)
    better = [
        run([x + 0.1 + rng.gauss(0, 0.02) for x in base], 0.5 + 0.01 * k, wall_s=10.0 + k, steps=5) for k in range(3)
    ]
    same = [run([x + rng.gauss(0, 0.05) for x in base], 0.9, wall_s=9.0) for _ in range(3)]
    return [
        ArmResults("bm25", "BM25", (0,), (run(base),), seeded=False),
        ArmResults("better", "Better | new", (0, 1, 2), tuple(better)),
        ArmResults("same", "Same", (0, 1, 2), tuple(same)),
    ]


CLAIMS = [
    Claim("better beats BM25", "mrr@10", "better", "bm25"),
    Claim("BM25 beats better", "mrr@10", "bm25", "better"),
    Claim("same beats BM25", "mrr@10", "same", "bm25"),
    Claim("better has the smaller loss", "loss", "better", "same", larger_is_better=False),
    Claim("about an arm not run", "mrr@10", "better", "absent"),
]


def report_of(arms: list[ArmResults]) -> dict[str, Any]:
    return build_report("demo", "tiny", arms, CLAIMS, ["mrr@10", "loss"])


def test_schema_of_the_design(arms: list[ArmResults], base: list[float]) -> None:
    report = report_of(arms)
    assert {"experiment", "scale", "device", "versions", "arms", "claims"} <= set(report)
    bm25, better, _ = report["arms"]
    assert better["name"] == "better"
    assert better["seeds"] == [0, 1, 2]
    metric = better["metrics"]["mrr@10"]
    assert metric["mean"] == pytest.approx(sum(metric["per_seed"]) / 3)
    assert metric["ci95"][0] < metric["mean"] < metric["ci95"][1]
    assert better["cost"] == {"wall_s": 11.0, "tokens": None, "steps": 5.0}  # means over seeds; tokens unknown
    assert bm25["metrics"]["mrr@10"]["per_seed"] == [pytest.approx(sum(base) / 100)]
    assert bm25["metrics"]["loss"]["ci95"] is None  # one value
    assert {"python", "torch", "numpy"} <= set(report["versions"])
    json.dumps(report, allow_nan=False)


def test_verdicts(arms: list[ArmResults]) -> None:
    claims = {claim["text"]: claim for claim in report_of(arms)["claims"]}
    assert claims["better beats BM25"]["holds"] is True
    assert claims["better beats BM25"]["difference"] == pytest.approx(0.1, abs=0.01)
    assert claims["BM25 beats better"]["holds"] is False
    assert claims["BM25 beats better"]["difference"] == pytest.approx(-claims["better beats BM25"]["difference"])
    assert claims["same beats BM25"]["holds"] == "inconclusive"
    smaller = claims["better has the smaller loss"]  # .51 +- .0248 (t of .50 .51 .52) minus .9
    assert smaller["holds"] is True
    assert smaller["ci95"] == pytest.approx([-0.39 - 0.02484, -0.39 + 0.02484], abs=1e-5)
    assert "about an arm not run" not in claims


def test_one_seed_says_what_it_does_not_cover(arms: list[ArmResults]) -> None:
    single = [ArmResults(arm.name, arm.title, (0,), arm.runs[:1], arm.seeded) for arm in arms]
    report = report_of(single)
    assert any("One seed" in note for note in report["notes"])
    assert report["claims"][0]["interval"] == "paired bootstrap over items"
    assert report["claims"][3]["ci95"] is None
    assert report["claims"][3]["holds"] == "inconclusive"


def test_different_items_are_not_compared(arms: list[ArmResults]) -> None:
    arms[0] = ArmResults("bm25", "BM25", (0,), (run([0.5]),), seeded=False)
    with pytest.raises(ValueError, match="cannot compare 'better' with 'bm25': item 'q1'"):
        report_of(arms)


def test_the_same_numbers_in_json_markdown_and_console(arms: list[ArmResults], tmp_path: Path) -> None:
    from rich.console import Console

    path = write_report(tmp_path, report_of(arms), {"mrr@10": "mrr_10.png"})
    report = json.loads((tmp_path / "report.json").read_text())
    screen = Console(width=200, file=io.StringIO())
    for table in console_tables(report):
        screen.print(table)
    printed = screen.file.getvalue()  # type: ignore[attr-defined]
    markdown = path.read_text()
    assert markdown == to_markdown(report, {"mrr@10": "mrr_10.png"})
    for arm in report["arms"]:
        cell = format_interval(arm["metrics"]["mrr@10"]["mean"], arm["metrics"]["mrr@10"]["ci95"])
        assert cell in markdown
        assert cell in printed
    for claim in report["claims"]:
        assert format_interval(claim["difference"], claim["ci95"], signed=True) in markdown
        assert claim["text"] in printed
    assert "Better \\| new" in markdown
    assert "![mrr@10](mrr_10.png)" in markdown
    assert "does not hold" in printed


def test_formats() -> None:
    assert format_interval(0.8124, [0.79, 0.834]) == "0.812 [0.790, 0.834]"
    assert format_interval(0.01, None, signed=True) == "+0.010"
    assert [format_seconds(x) for x in (0.44, 9.97, 59.6, 123, 3725)] == [
        "0.4 s",
        "10 s",
        "1 min 00 s",
        "2 min 03 s",
        "1 h 02 min",
    ]
    assert [format_count(x) for x in (850, 12_345, 4.52e6, 1.2e9)] == ["850", "12.3k", "4.5M", "1.2B"]
