"""What a single run measured: ``results.json`` in the run's folder."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from lit_core.errors import InputError
from lit_core.files import read_json, write_json

COSTS = ("wall_s", "tokens", "steps")


@dataclass(frozen=True)
class Results:
    """What one run of an arm measured; read from its ``results.json``.

    Args:
        metrics: Final metrics.
        per_item: For some of the metrics the value of every item (query, prompt), whose mean is the metric.
        cost: ``wall_s`` (seconds), ``tokens`` and ``steps`` (optimizer steps), as far as they are known.
    """

    metrics: dict[str, float]
    per_item: dict[str, dict[str, float]]
    cost: dict[str, float]


def write_results(
    folder: Path | str,
    metrics: Mapping[str, float],
    per_item: Mapping[str, Mapping[str, float]] | None = None,
    cost: Mapping[str, float] | None = None,
) -> None:
    """Write ``results.json``, atomically; its presence marks the arm as done, so this is the last thing an arm does.

    Args:
        folder: Folder of the arm and seed.
        metrics: Final metrics.
        per_item: For any of the metrics the values of its items, which make paired comparisons possible.
        cost: ``wall_s`` (seconds), ``tokens``, ``steps`` (optimizer steps). Left out, ``wall_s`` is what the runner's
            clock says, kills and restarts included.

    Raises:
        ValueError: A number is not finite, a cost has another name, or a metric is not the mean of its items.
    """
    per_item, cost = per_item or {}, cost or {}
    unknown = set(cost) - set(COSTS)
    if unknown:
        raise ValueError(f"costs are called {', '.join(COSTS)}, got {sorted(unknown)}")
    for name, value in [*metrics.items(), *cost.items()]:
        if not math.isfinite(value):
            raise ValueError(f"'{name}' must be finite, got {value}")
    for name, values in per_item.items():
        if name not in metrics:
            raise ValueError(f"'{name}' has values of items but is not among the metrics {sorted(metrics)}")
        mean = math.fsum(values.values()) / len(values) if values else math.nan
        if not abs(mean - metrics[name]) <= 1e-5 * max(1.0, abs(mean)):
            raise ValueError(f"'{name}' is {metrics[name]}, but the mean over its {len(values)} items is {mean}")
    content = {
        "metrics": {name: float(number) for name, number in metrics.items()},
        "cost": {name: float(number) for name, number in cost.items()},
        "per_item": {name: {item: float(x) for item, x in values.items()} for name, values in per_item.items()},
    }
    write_json(Path(folder) / "results.json", content)


def read_results(folder: Path | str) -> Results:
    """Read the ``results.json`` of an arm's folder; the runner's clock gives ``wall_s`` where the arm stated none.

    Raises:
        InputError: The file is missing or broken.
    """
    folder = Path(folder)
    path = folder / "results.json"
    value = read_json(path)
    try:
        results = Results(dict(value["metrics"]), dict(value["per_item"]), dict(value["cost"]))
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"not the results of an arm ({error}); delete the file to run the arm again", path) from None
    if "wall_s" not in results.cost and (folder / "elapsed.json").exists():
        results.cost["wall_s"] = float(read_json(folder / "elapsed.json")["wall_s"])
    return results
