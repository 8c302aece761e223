"""How far models went from their base, and whether in the same direction: what decides how much a merge method matters.

Where models are near their base, spherical means and the average are nearly one: with ``r = |model - base| / |base|``
and ``M`` models in random directions they differ by a factor of about ``1 + r^2 (1 - 1/M) / 2``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging.chunks import CHUNK_BYTES, Entries, Stack, TensorEntries
from lit_core.merging.method import check_choice
from lit_core.merging.model_folder import ModelFolder
from lit_core.merging.states import State, check_bytes, check_keys, first_names, merged_type
from lit_core.progress import track

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Level = Literal["tensor", "layer", "model"]
Value = Literal["ratio", "cosine"]


@dataclass(frozen=True)
class TensorDrift:
    """Sums over a tensor, or several.

    Args:
        name: Its name.
        numel: Entries.
        base_square: Squared norm of the base.
        gram: Dot products of the models' differences from the base, ``(models, models)``, float64.
    """

    name: str
    numel: int
    base_square: float
    gram: Tensor

    def row(self, models: Sequence[str]) -> dict[str, Any]:
        """Name, ``numel``, ``base_norm``, ``ratios`` by model, ``cosines`` by pair; None where not defined."""
        norms = self.gram.diagonal().sqrt().tolist()
        base = math.sqrt(self.base_square)
        pairs = [(i, j) for i in range(len(models)) for j in range(i + 1, len(models))]
        cosines = {}
        for i, j in pairs:
            lengths = norms[i] * norms[j]
            cosines[f"{models[i]}, {models[j]}"] = float(self.gram[i, j]) / lengths if lengths else None
        ratios = {model: norm / base if base else None for model, norm in zip(models, norms, strict=True)}
        return {"name": self.name, "numel": self.numel, "base_norm": base, "ratios": ratios, "cosines": cosines}


@dataclass(frozen=True)
class Drift:
    """Differences of models from their base.

    Args:
        models: Names of the models.
        tensors: One a floating tensor, in the base's order.
    """

    models: tuple[str, ...]
    tensors: tuple[TensorDrift, ...]

    def rows(self, by: Level = "layer") -> list[dict[str, Any]]:
        """A table that can be written as JSON.

        Args:
            by: ``tensor``; ``layer``, whose norms and cosines are those of its tensors as one vector; or ``model``.

        Returns:
            Rows as :meth:`TensorDrift.row` has them: ``ratios`` is the norm of the difference over that of the base,
            and ``cosines`` are those between differences.
        """
        check_choice("by", by, Level)
        groups: dict[str, list[TensorDrift]] = {}
        for tensor in self.tensors:
            key = {"tensor": tensor.name, "layer": layer_of(tensor.name), "model": "all"}[by]
            groups.setdefault(key, []).append(tensor)
        return [_joined(name, group).row(self.models) for name, group in groups.items()]


def layer_of(name: str) -> str:
    """The part of a tensor's name up to the number of its layer, or without its last part: ``model.layers.3``."""
    match = re.match(r"(?:.*?\.)?\d+(?=\.)", name)
    return match[0] if match else name.rpartition(".")[0] or name


def drift(
    models: Sequence[State | Path | str] | Mapping[str, State | Path | str],
    base: State | Path | str,
    chunk_bytes: int = CHUNK_BYTES,
) -> Drift:
    """Measure how far models went from their base.

    Args:
        models: State dicts, or folders that are read a chunk at a time; by name, or else by the folder's name or by
            number.
        base: That of which they were trained.
        chunk_bytes: Most memory for chunks.

    Raises:
        InputError: No model, a folder is none, or names and shapes do not fit.
    """
    check_bytes("chunk_bytes", chunk_bytes)
    named = models if isinstance(models, Mapping) else dict(zip(_names(models), models, strict=True))
    if not named:
        raise InputError("need at least one model", field="models")
    with ExitStack() as stack:
        root = _entries(base, stack)
        found = {name: _entries(model, stack) for name, model in named.items()}
        for name, tensors in found.items():
            check_keys(root.keys(), tensors.keys(), name)
        measured = []
        for key in track([*root], "drift", unit="tensor"):
            rows = [tensors[key] for tensors in found.values()]
            if merged_type(key, rows, root[key], torch.float64).is_floating_point:
                measured.append(_measure(Stack(key, rows, root[key], chunk_bytes)))
    return Drift(tuple(named), tuple(measured))


def drift_figure(report: Drift, value: Value = "ratio", by: Level = "layer") -> "Figure":
    """A heat map: layers or tensors as rows; a column a model (``ratio``) or a pair of models (``cosine``).

    Args:
        report: What :func:`drift` found.
        value: Norm of the difference over that of the base, or the cosine between two differences.
        by: What a row is.

    Raises:
        InputError: Cosines of a single model.
    """
    import numpy as np

    from lit_core.plots import INK, canvas

    check_choice("value", value, Value)
    if value == "cosine" and len(report.models) < 2:
        raise InputError("a cosine needs two models", field="value")
    rows = report.rows(by)
    field, scale = ("ratios", "Blues") if value == "ratio" else ("cosines", "PuOr")
    columns = list(rows[0][field])
    table = np.array([[math.nan if cell is None else cell for cell in row[field].values()] for row in rows])
    title = "Distance from the base" if value == "ratio" else "Directions from the base"
    subtitle = "norm of the difference / norm of the base" if value == "ratio" else "cosine between two differences"
    low, top = (0.0, None) if value == "ratio" else (-1.0, 1.0)
    width = 4.0 + min(14.0, 0.75 * len(columns))
    with canvas(width, 1.9 + 0.24 * len(rows), title, subtitle) as (figure, axes):
        image = axes.imshow(table, aspect="auto", cmap=scale, vmin=low, vmax=top)
        axes.set_yticks(range(len(rows)), [row["name"] for row in rows], color=INK, fontsize=8)
        axes.set_xticks(range(len(columns)), columns, color=INK, fontsize=8, rotation=30, ha="right")
        axes.tick_params(length=0)
        axes.grid(visible=False)
        high = float(np.nanmax(np.abs(table))) if np.isfinite(table).any() else 1.0
        for (row, column), cell in np.ndenumerate(table):
            dark = abs(cell) > 0.6 * (high if value == "ratio" else 1.0)
            text = "-" if math.isnan(cell) else f"{cell:.2g}" if value == "ratio" else f"{cell:.2f}"
            axes.text(column, row, text, ha="center", va="center", fontsize=7, color="white" if dark else INK)
        figure.colorbar(image, ax=axes, fraction=0.05)
    return figure


def _names(models: Sequence[State | Path | str]) -> list[str]:
    """Names of folders where each has its own, and numbers otherwise."""
    names = [f"model {n}" if isinstance(model, Mapping) else Path(model).name for n, model in enumerate(models)]
    return names if len(set(names)) == len(names) else [f"model {number}" for number in range(len(models))]


def _entries(source: State | Path | str, stack: ExitStack) -> Mapping[str, Entries]:
    """Tensors by name; those that are tied in memory once."""
    if isinstance(source, Mapping):
        first_of = first_names(source)
        return {key: TensorEntries(tensor) for key, tensor in source.items() if first_of[key] == key}
    return stack.enter_context(ModelFolder(Path(source))).tensors


def _measure(stack: Stack) -> TensorDrift:
    size, square = len(stack.models), 0.0
    gram = torch.zeros(size, size, dtype=torch.float64)
    for base, deltas in stack.deltas():
        gram.addmm_(deltas, deltas.T)
        square += float(base @ base)
    return TensorDrift(stack.name, stack.numel, square, gram)


def _joined(name: str, parts: Sequence[TensorDrift]) -> TensorDrift:
    gram = torch.stack([part.gram for part in parts]).sum(0)
    return TensorDrift(name, sum(part.numel for part in parts), sum(part.base_square for part in parts), gram)
