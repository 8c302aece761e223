import json
import math
from pathlib import Path

import pytest

from lit_core.errors import InputError
from lit_core.results import read_results, write_results


def test_what_is_written_is_read(tmp_path: Path) -> None:
    write_results(
        tmp_path, {"mrr@10": 0.5, "loss": 2.0}, {"mrr@10": {"q1": 0.0, "q2": 1.0}}, {"tokens": 10, "wall_s": 3}
    )
    results = read_results(tmp_path)
    assert results.metrics == {"mrr@10": 0.5, "loss": 2.0}
    assert results.per_item == {"mrr@10": {"q1": 0.0, "q2": 1.0}}
    assert results.cost == {"tokens": 10.0, "wall_s": 3.0}


def test_the_clock_gives_the_time_that_the_arm_did_not(tmp_path: Path) -> None:
    write_results(tmp_path, {"mrr@10": 0.5})
    (tmp_path / "elapsed.json").write_text(json.dumps({"wall_s": 7.5}))
    assert read_results(tmp_path).cost == {"wall_s": 7.5}


def test_numbers_that_contradict_one_another_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'mrr@10' is 0.6, but the mean over its 2 items is 0.5"):
        write_results(tmp_path, {"mrr@10": 0.6}, {"mrr@10": {"q1": 0.0, "q2": 1.0}})
    with pytest.raises(ValueError, match="'loss' must be finite"):
        write_results(tmp_path, {"loss": math.nan})
    with pytest.raises(ValueError, match="'ndcg@10' has values of items but"):
        write_results(tmp_path, {}, {"ndcg@10": {"q1": 0.0}})
    with pytest.raises(ValueError, match=r"wall_s, tokens, steps, got \['time'\]"):
        write_results(tmp_path, {}, cost={"time": 1.0})
    assert not list(tmp_path.iterdir())


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(InputError, match=r"results.json: not the results of an arm \('metrics'\)"):
        read_results(tmp_path)
