"""Numbers worked out by hand, and plain loops over Python's own floats, for every method."""

import itertools
import math
import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging import METHODS, merge
from lit_core.merging.dare import bernoulli_mask

Rows = Sequence[Sequence[float]]

D, E, F = (1, 2, 2), (2, 1, 2), (2, -2, 1)  # all of length 3
A, B, C = (1, 0, 0), (0, 2, 0), (0, 0, 3)
BASE = (1, 1, 1)
CONVERGED = {"iterations": 100, "tolerance": 0.0}
DELTAS = ((0.6, -0.2, 0.1), (-0.4, -0.5, 0.3), (0.5, 0.1, -0.5))
TUNED = tuple(tuple(1 + value for value in row) for row in DELTAS)


def merged(
    models: Rows,
    method: str,
    weights: Sequence[float] | None = None,
    base: Sequence[float] | None = None,
    **options: Any,
) -> list[float]:
    """One tensor merged, float64."""
    states = [{"w": torch.tensor(row, dtype=torch.float64)} for row in models]
    root = None if base is None else {"w": torch.tensor(base, dtype=torch.float64)}
    return merge(states, method, weights, root, **options)["w"].tolist()


@pytest.mark.parametrize(
    ("models", "method", "weights", "base", "options", "expected"),
    [
        ((D, E, F), "linear", (1, 2, 1), None, {}, (1.75, 0.5, 1.75)),
        ((D, E, F), "linear", (1, 2, 1), None, {"normalize": False}, (7, 2, 7)),
        (((3, 0, 4), (0, 5, 0)), "slerp", None, None, {}, (2.121320, 3.535534, 2.828427)),
        (((3, 0, 4), (0, 5, 0)), "slerp", None, None, {"t": 0.25}, (2.771638, 1.913417, 3.695518)),
        (((3, 0, 4), (0, 5, 0)), "slerp", (3, 1), None, {}, (2.771638, 1.913417, 3.695518)),
        (((3, 0, 4), (0, 0, 2)), "slerp", None, None, {}, (1.581139, 0, 3.162278)),
        ((A, B), "slerp", None, None, {}, (0.707107, 1.414214, 0)),
        ((A, B), "slerp", None, None, {"t": 0.25}, (0.923880, 0.765367, 0)),
        (((1, 0), (1, 0.01)), "slerp", None, None, {}, (1, 0.005)),  # nearly parallel
        ((A, B, C), "multislerp", None, None, {}, (1.154701, 1.154701, 1.154701)),
        ((A, B, C), "multislerp", (0.5, 0.3, 0.2), None, {}, (1.378882, 0.827329, 0.551553)),
        ((A, B), "multislerp", None, None, {}, (1.060660, 1.060660, 0)),
        ((A, B), "multislerp", (0.75, 0.25), None, {}, (1.185854, 0.395285, 0)),
        ((A, B), "multislerp", None, (0.5, 0.5, 0), {}, (1.473249, 1.101501, 0)),
        ((D, E, F), "multislerp", None, None, {}, (2.100420, 0.420084, 2.100420)),
        ((D, E, F), "multislerp", (0.2, 0.3, 0.5), None, {}, (2.286002, -0.381000, 1.905002)),
        ((D, E, F), "multislerp", None, BASE, {}, (2.159587, 0.726259, 2.602510)),
        ((D, E, F), "multislerp", None, BASE, {"space": "weight"}, (2.100420, 0.420084, 2.100420)),
        ((A, B, C), "multislerp", (0.5, 0.3, 0.2), None, {"tangent": "log"}, (1.325301, 0.870694, 0.612756)),
        ((D, E, F), "multislerp", (0.2, 0.3, 0.5), None, {"tangent": "log"}, (2.279670, -0.352983, 1.917944)),
        ((A, B, C), "karcher", (0.5, 0.3, 0.2), None, CONVERGED, (1.316218, 0.876085, 0.624537)),
        ((D, E, F), "karcher", None, None, CONVERGED, (2.119963, 0.345404, 2.094386)),
        ((D, E, F), "karcher", (0.2, 0.3, 0.5), None, CONVERGED, (2.279125, -0.353221, 1.918548)),
        ((D, E, F), "multislerp", (0.2, 0.3, 0.5), None, {"tangent": "karcher"}, (2.279125, -0.353221, 1.918548)),
        (TUNED, "task_arithmetic", (0.5, 0.5, 0.5), BASE, {}, (1.35, 0.7, 0.95)),
        (TUNED, "task_arithmetic", None, BASE, {"normalize": True}, (1.233333, 0.8, 0.966667)),
        (TUNED, "task_arithmetic", None, BASE, {"lam": 0.5}, (1.35, 0.7, 0.95)),
        (TUNED, "ties", None, BASE, {"density": 2 / 3}, (1.55, 0.65, 0.5)),
        (TUNED, "ties", (2, 1, 1), BASE, {"density": 2 / 3}, (1.566667, 0.7, 0.5)),
        (TUNED, "ties", (2, 1, 1), BASE, {"density": 2 / 3, "consensus": "count"}, (1.85, 0.55, 0.5)),
        (TUNED, "ties", None, BASE, {"density": 2 / 3, "lam": 2.0}, (2.1, 0.3, 0)),
        (((0.5, -0.2, 0.1, 0), (-0.1, -0.4, 0.3, 0.2)), "ties", (0.6, 0.4), (0, 0, 0, 0), {"density": 0.5},
         (0.5, -0.28, 0.3, 0)),
        (TUNED, "sce", None, BASE, {}, (1.544565, 0.635165, 0.5)),
        (TUNED, "sce", None, BASE, {"select_topk": 0.67}, (1.542529, 1, 0.5)),
        (((2, 1, 1), (2, 2, 1)), "model_stock", None, BASE, {}, (1.828427, 1.414214, 1)),
        (((2, 1, 1), (2, 2, 1), (2, 1, 2)), "model_stock", None, BASE, {}, (1.840990, 1.280330, 1.280330)),
        (((2, 1, 1), (1, 2, 1)), "model_stock", None, BASE, {}, BASE),  # orthogonal
    ],
)  # fmt: skip
def test_numbers_worked_out_by_hand(
    models: Rows, method: str, weights: Any, base: Any, options: dict[str, Any], expected: Sequence[float]
) -> None:
    close = 1e-5 if options.get("tangent") == "karcher" else 6e-7  # the last step, below 1e-5 radians
    assert merged(models, method, weights, base, **options) == pytest.approx(expected, abs=close)


def dot(one: Sequence[float], two: Sequence[float]) -> float:
    return sum(a * b for a, b in zip(one, two, strict=True))


def norm(row: Sequence[float]) -> float:
    return math.sqrt(dot(row, row))


def mix(rows: Rows, weights: Sequence[float]) -> list[float]:
    return [sum(w * row[i] for w, row in zip(weights, rows, strict=True)) for i in range(len(rows[0]))]


def loop_slerp(models: Rows, weights: Sequence[float], base: Sequence[float], **_: Any) -> list[float]:
    found, total = list(models[0]), weights[0]
    for model, weight in zip(models[1:], weights[1:], strict=True):
        total += weight
        theta = math.acos(dot(found, model) / (norm(found) * norm(model)))
        t = weight / total
        parts = [math.sin((1 - t) * theta) / math.sin(theta), math.sin(t * theta) / math.sin(theta)]
        found = mix([found, model], parts)
    return found


def loop_mean(models: Rows, weights: Sequence[float], steps: int) -> list[float]:
    """With the tangent vectors as mergekit computes them where ``steps`` is 0, else with the logarithm."""
    parts = [w / sum(weights) for w in weights]
    units = [[value / norm(row) for value in row] for row in models]
    mean = mix(units, parts)
    point = [value / norm(mean) for value in mean]
    for number in range(max(1, steps)):
        tangents = []
        for unit in units:
            cosine = dot(unit, point)
            away = [u - cosine * p for u, p in zip(unit, point, strict=True)]
            factor = math.acos(cosine) / math.sin(math.acos(cosine)) if steps else 1.0
            tangents.append([factor * value for value in away])
        tangent = mix(tangents, parts)
        size = norm(tangent)
        assert size < 1e-12 or steps, "the projections should cancel"
        if size > 1e-14:
            point = mix([point, tangent], [math.cos(size), math.sin(size) / size])
        assert number < 200
    return [value * dot(parts, [norm(row) for row in models]) for value in point]


def loop_karcher_of_deltas(models: Rows, weights: Sequence[float], base: Sequence[float]) -> list[float]:
    deltas = [[a - b for a, b in zip(model, base, strict=True)] for model in models]
    return [b + d for b, d in zip(base, loop_mean(deltas, weights, 100), strict=True)]


def loop_agreed(deltas: Rows, weights: Sequence[float], normalize: bool) -> list[float]:
    found = []
    for column in zip(*deltas, strict=True):
        sign = 1 if sum(w * d for w, d in zip(weights, column, strict=True)) >= 0 else -1
        kept = [(w, d) for w, d in zip(weights, column, strict=True) if w * d * sign > 0]
        total, counted = sum(w * d for w, d in kept), sum(w for w, _ in kept)
        found.append(total / counted if normalize and abs(counted) > 1e-8 else total)
    return found


def loop_ties(models: Rows, weights: Sequence[float], base: Sequence[float], density: float, **_: Any) -> list[float]:
    deltas = []
    for model in models:
        delta = [a - b for a, b in zip(model, base, strict=True)]
        order = sorted(range(len(delta)), key=lambda i: (-abs(delta[i]), i))[: max(1, int(density * len(delta)))]
        deltas.append([value if i in order else 0.0 for i, value in enumerate(delta)])
    return [b + d for b, d in zip(base, loop_agreed(deltas, weights, True), strict=True)]


def loop_dare(
    models: Rows, weights: Sequence[float], base: Sequence[float], density: float, rescale: str, signs: bool
) -> list[float]:
    deltas = []
    for number, model in enumerate(models):
        delta = [a - b for a, b in zip(model, base, strict=True)]
        mask = bernoulli_mask(0, "w", number, 0, len(base), density).tolist()
        left = [value if stays else 0.0 for value, stays in zip(delta, mask, strict=True)]
        factor = {"density": 1 / density, "none": 1.0}.get(rescale) or sum(map(abs, delta)) / sum(map(abs, left))
        deltas.append([factor * value for value in left])
    merged = loop_agreed(deltas, weights, False) if signs else mix(deltas, weights)
    return [b + d for b, d in zip(base, merged, strict=True)]


def loop_sce(models: Rows, base: Sequence[float], select_topk: float) -> list[float]:
    deltas = [[a - b for a, b in zip(model, base, strict=True)] for model in models]
    columns = list(zip(*deltas, strict=True))
    variances = [sum((d - sum(c) / len(c)) ** 2 for d in c) / len(c) for c in columns]
    order = sorted(range(len(base)), key=lambda i: (-variances[i], i))
    chosen = order[: int(select_topk * sum(v > 0 for v in variances))]
    deltas = [[value if i in chosen else 0.0 for i, value in enumerate(row)] for row in deltas]
    squares = [sum(value**2 for value in row) / len(row) for row in deltas]
    found = []
    for column in zip(*deltas, strict=True):
        sign = 1 if sum(column) >= 0 else -1
        kept = [(w / sum(squares), d) for w, d in zip(squares, column, strict=True) if d * sign > 0]
        found.append(sum(w * d for w, d in kept) / sum(w for w, _ in kept) if kept else 0.0)
    return [b + d for b, d in zip(base, found, strict=True)]


def loop_stock(models: Rows, base: Sequence[float]) -> list[float]:
    deltas = [[a - b for a, b in zip(model, base, strict=True)] for model in models]
    cosines = [dot(one, two) / (norm(one) * norm(two)) for one, two in itertools.combinations(deltas, 2)]
    cosine, count = sum(cosines) / len(cosines), len(models)
    t = min(1.0, max(0.0, count * cosine / (1 + (count - 1) * cosine)))
    return [t * m + (1 - t) * b for m, b in zip(mix(models, [1 / count] * count), base, strict=True)]


LOOPS: list[tuple[str, dict[str, Any], bool, Callable[..., list[float]]]] = [  # weights are given where True
    ("linear", {}, True, lambda m, w, b: mix(m, [x / sum(w) for x in w])),
    ("task_arithmetic", {"lam": 0.7}, True,
     lambda m, w, b, lam: [v + lam * sum(x * (r[i] - v) for x, r in zip(w, m, strict=True)) for i, v in enumerate(b)]),
    ("slerp", {"space": "weight"}, True, loop_slerp),
    ("multislerp", {"space": "weight"}, True, lambda m, w, b, space: loop_mean(m, w, 0)),
    ("multislerp", {"space": "weight", "tangent": "log"}, True, lambda m, w, b, space, tangent: loop_mean(m, w, 1)),
    ("karcher", {"space": "weight", "iterations": 100, "tolerance": 1e-12}, True,
     lambda m, w, b, space, iterations, tolerance: loop_mean(m, w, 100)),
    ("karcher", {}, True, loop_karcher_of_deltas),
    ("ties", {"density": 0.3}, True, loop_ties),
    ("ties", {"density": 1e-9}, True, loop_ties),
    ("dare_linear", {"density": 0.3, "rescale": "density"}, True, partial(loop_dare, signs=False)),
    ("dare_linear", {"density": 0.3, "rescale": "l1"}, True, partial(loop_dare, signs=False)),
    ("dare_ties", {"density": 0.6, "rescale": "density"}, True, partial(loop_dare, signs=True)),
    ("dare_ties", {"density": 0.6, "rescale": "l1"}, True, partial(loop_dare, signs=True)),
    ("dare_ties", {"density": 0.6, "rescale": "none"}, True, partial(loop_dare, signs=True)),
    ("sce", {"select_topk": 1}, False, loop_sce),
    ("sce", {"select_topk": 0.4}, False, loop_sce),
    ("model_stock", {}, False, loop_stock),
]  # fmt: skip


@pytest.mark.parametrize(("method", "options", "weighted", "loop"), LOOPS)
@pytest.mark.parametrize("seed", [0, 1])
def test_a_method_is_its_plain_loop(
    method: str, options: dict[str, Any], weighted: bool, loop: Callable[..., list[float]], seed: int
) -> None:
    draw = random.Random(seed)
    base = [draw.gauss(0, 1) for _ in range(60)]
    models = [[value + 0.5 * draw.gauss(0.2, 1) for value in base] for _ in range(4)]
    weights = [draw.uniform(0.2, 2) for _ in models]
    expected = loop(models, weights, base, **options) if weighted else loop(models, base, **options)
    for chunk_bytes in (2**24, 1000):  # one chunk, and chunks of six entries
        found = merged(models, method, weights if weighted else None, base, chunk_bytes=chunk_bytes, **options)
        tolerance = 1e-4 if not options and method == "karcher" else 1e-9  # it ends after a step below 1e-5
        assert found == pytest.approx(expected, abs=tolerance)


def test_both_scalings_of_dare(monkeypatch: pytest.MonkeyPatch) -> None:
    from lit_core.merging import dare

    monkeypatch.setattr(dare, "bernoulli_mask", lambda *_: torch.tensor([True, False, True]))
    for method in ("dare_linear", "dare_ties"):
        over: Callable[..., list[float]] = lambda **o: merged(TUNED[:1], method, None, BASE, density=0.5, **o)  # noqa: B023, E731
        assert over() == pytest.approx([2.2, 1, 1.2])
        assert over(rescale="l1") == pytest.approx([1.771429, 1, 1.128571], abs=1e-6)
        assert over(rescale="none") == pytest.approx([1.6, 1, 1.1])
        assert over(lam=0.5) == pytest.approx([1.6, 1, 1.1])


def test_masks_follow_tensor_model_and_place_alone() -> None:
    whole = bernoulli_mask(3, "layer.weight", 1, 0, 100_003, 0.3)
    assert abs(float(whole.double().mean()) - 0.3) < 0.006  # four standard deviations
    starts = [0, 1, 7, 8, 9, 4096, 50_001, 100_003]
    parts = [bernoulli_mask(3, "layer.weight", 1, a, b, 0.3) for a, b in itertools.pairwise(starts)]
    assert torch.equal(torch.cat(parts), whole)
    for other in ((4, "layer.weight", 1), (3, "layer.bias", 1), (3, "layer.weight", 2)):
        agree = (bernoulli_mask(*other, 0, 100_003, 0.3) == whole).double().mean()
        assert abs(float(agree) - 0.58) < 0.007  # of independent masks .3^2 + .7^2
    assert bernoulli_mask(0, "w", 0, 0, 1000, 1.0).all()
    neighbours = (whole[1:] & whole[:-1]).double().mean()
    assert abs(float(neighbours) - 0.09) < 0.004
    state: list[dict[str, Tensor]] = [{"a": torch.randn(50), "b": torch.randn(50)} for _ in range(3)]
    turned = [dict(reversed(one.items())) for one in state]
    one, two = (merge(s[:2], "dare_ties", base=s[2]) for s in (state, turned))
    assert torch.equal(one["a"], two["a"])
    assert not torch.equal(one["a"], merge(state[:2], "dare_ties", base=state[2], seed=1)["a"])


@pytest.mark.parametrize("method", sorted(set(METHODS) - {"dare_linear", "dare_ties"}))
def test_equal_models_and_one_model(method: str) -> None:
    base, model = [0.0, 1.0, -2.0, 0.5], [1.0, -1.0, 3.0, 0.25]
    root = base if METHODS[method].needs_base else None
    options: dict[str, Any] = {"density": 1.0} if method == "ties" else {}
    options |= {"select_topk": 0.5} if method == "sce" else {}  # where nothing varies everything stays
    weights = [0.25] * 4 if method == "task_arithmetic" else None
    assert merged([model] * 4, method, weights, root, **options) == pytest.approx(model)
    if method == "model_stock":
        with pytest.raises(InputError, match="field 'models': need at least 2 models"):
            merged([model], method, None, root)
    else:
        assert merged([model], method, None, root, **options) == pytest.approx(model)


def test_zero_opposite_and_scalar_tensors() -> None:
    zero = (0.0, 0.0, 0.0)
    for method in ("slerp", "multislerp", "karcher"):
        assert merged([zero, zero], method) == list(zero)
        half = 1 if method == "slerp" else 2  # it goes along the line, the others keep the mean length
        assert merged([D, [-v for v in D]], method, (3, 1)) == pytest.approx([0.5 * half, half, half])
        with pytest.raises(InputError, match=r"'on_zero': tensor 'w': is zero in models \[1\] \(from 0\), and so has"):
            merged([D, zero], method, on_zero="error")
        assert merged([[2.0], [4.0]], method) == pytest.approx([3.0])
    assert merged([D, [-v for v in D]], "multislerp") == pytest.approx(zero)  # no direction: the linear mean
    assert merged([D, zero], "slerp", (1, 3)) == pytest.approx([0.25, 0.5, 0.5])
    assert merged([D, E, zero], "multislerp") == pytest.approx([1, 1, 4 / 3], rel=0.05)  # mean length 2
    assert norm(merged([D, E, zero], "karcher")) == pytest.approx(2)
    assert merged([D, BASE], "multislerp", None, BASE, space="delta") == pytest.approx([1, 1.5, 1.5])


def test_model_stock_without_a_direction() -> None:
    assert merged([(2, 1, 1), (0, 1, 1.5)], "model_stock", None, BASE) == list(BASE)  # cosine below 0
    assert merged([(3, 1, 1), BASE], "model_stock", None, BASE) == pytest.approx([2, 1, 1])  # one vector: the mean
    assert merged([BASE, BASE], "model_stock", None, BASE) == list(BASE)
    over = merged([(2, 1, 1), (2, 2, 1), BASE], "model_stock", None, BASE)  # cosine of the pair that has one
    t = 3 * 0.5**0.5 / (1 + 2 * 0.5**0.5)
    assert over == pytest.approx([1 + t * 2 / 3, 1 + t / 3, 1])
    with pytest.raises(InputError, match="tensor 'w': is zero in models"):
        merged([BASE, (2, 1, 1)], "model_stock", None, BASE, on_zero="error")


def test_ties_among_magnitudes_go_to_the_first() -> None:
    ones = [1.0] * 10
    for chunk_bytes in (2**20, 1):
        found = merged([ones], "ties", None, [0.0] * 10, density=0.35, chunk_bytes=chunk_bytes)
        assert found == [1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
        two = merged([[0, 1, 2, 1, 1], [1, 1, 0, 1, 3]], "ties", None, [0] * 5, density=0.4, chunk_bytes=chunk_bytes)
        assert two == [1, 1, 2, 0, 3]
    assert merged([(1, -1)], "ties", (-1,), (0, 0), density=1.0) == [1, -1]  # -1 * 1 / -1
    assert merged([(1, 0), (-1, 0)], "ties", None, (0, 0), density=1.0) == [1, 0]  # a sum of 0 elects plus


def test_drift_decides_how_far_spherical_means_are_from_the_average() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randn(200_000, generator=generator, dtype=torch.float64)
    for drift, share in ((0.3, 0.26), (0.1, 0.089), (0.03, 0.027), (0.01, 0.009), (0.003, 0.0027)):
        models = []
        for _ in range(5):
            noise = torch.randn(base.shape, generator=generator, dtype=torch.float64)
            models.append({"w": base + drift * base.norm() / noise.norm() * noise})
        linear, spherical = merge(models, "linear")["w"], merge(models, "multislerp")["w"]
        assert float((spherical - linear).norm() / (linear - base).norm()) == pytest.approx(share, rel=0.03)
        scale = float(spherical @ linear / (linear @ linear))
        assert scale - 1 == pytest.approx(drift**2 * (1 - 1 / 5) / 2, rel=0.05)
        assert float((spherical - scale * linear).norm() / linear.norm()) < 2e-5 + drift**3


@pytest.mark.parametrize(
    ("method", "options", "told"),
    [
        ("ties", {"density": 0}, "field 'density': must be above 0 and at most 1, got 0"),
        ("ties", {"density": 1.2}, "field 'density': must be above 0 and at most 1, got 1.2"),
        ("ties", {"lam": -1.0}, "field 'lam': must be above 0, got -1.0"),
        ("ties", {"consensus": "most"}, "field 'consensus': must be one of weighted, count, got 'most'"),
        ("task_arithmetic", {"lam": math.inf}, "field 'lam': must be above 0, got inf"),
        ("task_arithmetic", {"lam": "1"}, "field 'lam': must be above 0, got '1'"),
        ("dare_ties", {"density": True}, "field 'density'"),
        ("dare_linear", {"rescale": "l2"}, "must be one of density, l1, none"),
        ("dare_linear", {"seed": 0.5}, "field 'seed': must be a whole number"),
        ("sce", {"select_topk": 0.0}, "field 'select_topk': must be above 0 and at most 1"),
        ("sce", {"weights": [1, 1]}, "field 'weights': sce finds its weights itself"),
        ("model_stock", {"weights": [1, 1]}, "field 'weights': model_stock finds its weights itself"),
        ("slerp", {"t": 1.5}, "field 't': must be at least 0 and at most 1, got 1.5"),
        ("slerp", {"t": 0.5, "weights": [1, 1]}, "field 't': is a place between two models without weights"),
        ("karcher", {"iterations": 0}, "field 'iterations': must be at least 1"),
        ("multislerp", {"tangent": "exact"}, "must be one of projection, log, karcher"),
        ("multislerp", {"weights": [2, -1]}, "field 'weights': multislerp takes no weights below 0"),
        ("multislerp", {"weights": [0, 0]}, "divides by the sum of the weights, which is 0"),
        ("multislerp", {"space": "delta", "base": None}, "field 'base': space 'delta' needs the base"),
        ("ties", {"base": None}, "field 'base': ties needs the base that the models were trained from"),
    ],
)
def test_wrong_options(method: str, options: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        merged([D, E], method, **{"base": BASE, **options})


@pytest.mark.parametrize("method", sorted(METHODS))
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(method: str, value: float) -> None:
    with pytest.raises(InputError, match="tensor 'w' has values that are not finite"):
        merged([D, (1, value, 2)], method, None, BASE)
