import json
import math
from pathlib import Path
from typing import Any

import pytest

from experiments.tre import tabular
from experiments.tre.tabular import FIGURES, study


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Seeds of every call that trains."""
    seen: list[list[int]] = []
    original = tabular.run

    def recorded(*args: Any) -> Any:
        seen.append(list(args[3]))
        return original(*args)

    monkeypatch.setattr(tabular, "run", recorded)
    return seen


@pytest.mark.slow  # draws figures
def test_a_study_runs_each_seed_of_a_setting_once(tmp_path: Path, calls: list[list[int]]) -> None:
    report = study(tmp_path, [0, 1], quick=True)
    assert calls == [[0, 1]] * 13
    assert [(row["title"], row["coefficient"]) for row in report["rows"]][4:6] == [("entropy", 0.03), ("TRE-K2", 0.001)]
    calls.clear()
    assert study(tmp_path, [0, 1], quick=True) == report
    assert calls == []
    assert len(study(tmp_path, [1, 2], quick=True)["rows"]) == 13
    assert calls == [[2]] * 13
    calls.clear()
    more = study(tmp_path, [2], quick=True, extended=True)
    assert {row["part"] for row in more["rows"]} == set(tabular.PARTS)
    assert calls == [[2]] * (len(more["rows"]) - 13 - 5)  # the quick task has T = 4, four of these rows; and one K = 2


@pytest.mark.slow
def test_the_files_of_a_study(tmp_path: Path) -> None:
    report = study(tmp_path, [0, 1, 2], quick=True)
    stored = json.loads((tmp_path / "tabular.json").read_text())
    assert {name: stored[name] for name in report} == json.loads(json.dumps(report))
    assert {path.name for path in tmp_path.iterdir()} == {"tabular.json", "tabular.md", *FIGURES}
    entry = report["rows"][5]["metrics"]["reward"]
    assert entry["mean"] == pytest.approx(math.fsum(entry["per_seed"]) / 3)
    assert entry["ci95"][0] < entry["mean"] < entry["ci95"][1]
    text = (tmp_path / "tabular.md").read_text()
    assert f"| TRE-K2 | 0.001 | {entry['mean']:.3f} [{entry['ci95'][0]:.3f}, {entry['ci95'][1]:.3f}] |" in text
    assert "the habit and the better token are both in the top 2" in text
    assert "A quick run: the numbers mean nothing." in text
    assert all(f"]({name})" in text for name in FIGURES)


@pytest.mark.slow
def test_one_seed_has_no_interval(tmp_path: Path) -> None:
    report = study(tmp_path, [3], quick=True)
    assert all(row["metrics"]["reward"]["ci95"] is None for row in report["rows"])
    assert [one["title"] for one in report["best"]] == list(tabular.TERMS)[1:]


@pytest.mark.parametrize("seeds", [[], [1, 1]])
def test_seeds_must_differ(tmp_path: Path, seeds: list[int]) -> None:
    with pytest.raises(ValueError, match="need different seeds, at least one"):
        study(tmp_path, seeds)
