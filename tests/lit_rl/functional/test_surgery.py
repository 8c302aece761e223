"""Weights from Gram matrices: the card's numbers, the literal projection, facts, and a reference solver."""

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch import Tensor

from lit_rl.functional.interference import conflicts, interference, module_cosines
from lit_rl.functional.surgery import (
    cagrad_weights,
    draw_orders,
    fixed_orders,
    gradvac_weights,
    mgda_weights,
    surgery_weights,
)

EX1 = torch.tensor([[3.0, 0, 1, -1], [2, 1, -1, 0]], dtype=torch.float64)
EX2 = torch.tensor([[1.0, 2, 3, 0], [2, 1, -4, 1]], dtype=torch.float64)
EX3 = torch.tensor([[1.0, 0], [-1, 1], [-1, -2]], dtype=torch.float64)


def gram(gradients: Tensor, parts: int = 1) -> Tensor:
    """``(T, N)`` cut into equal modules: ``(M, T, T)``."""
    split = gradients.unflatten(1, (parts, -1)).transpose(0, 1)
    return split @ split.transpose(1, 2)


def combined(gradients: Tensor, weights: Tensor) -> Tensor:
    """``(T, N)`` and ``(M, T)``: ``(N,)``."""
    return torch.einsum("mt,tmn->mn", weights, gradients.unflatten(1, (len(weights), -1))).flatten()


def projected(gradients: Tensor, orders: Tensor) -> Tensor:
    """PCGrad as its definition has it, on whole vectors."""
    total = torch.zeros_like(gradients[0])
    for own, others in enumerate(orders.tolist()):
        left = gradients[own].clone()
        for other in others:
            dot, square = left @ gradients[other], gradients[other] @ gradients[other]
            if dot < 0 and square > 1e-12:
                left = left - dot / square * gradients[other]
        total += left
    return total


def close(found: Tensor, expected: object, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), atol=tolerance, rtol=0)


def random_gradients(domains: int, width: int, seed: int) -> Tensor:
    return torch.randn(domains, width, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_a_conflict_hidden_in_the_sum() -> None:  # card, Ex 1
    by_module, whole = gram(EX1, 2), gram(EX1)
    close(by_module[:, 0, 1], [6.0, -1])
    close(module_cosines(whole)[0, 0, 1], 0.615, 1e-3)
    close(module_cosines(by_module)[:, 0, 1], [0.894, -0.707], 1e-3)
    mixed = combined(EX1, surgery_weights(whole))
    close(mixed, [5.0, 1, 0, -1])
    close(mixed, EX1.sum(0))
    mgs = combined(EX1, surgery_weights(by_module))
    close(mgs, [5.0, 1, -0.5, -1.5])
    close(EX1[:, 2:] @ mgs[2:], [1.0, 0.5])
    close(EX1[:, 2:] @ mixed[2:], [1.0, 0.0])


def test_global_surgery_touches_the_wrong_module() -> None:  # card, Ex 2
    by_module, whole = gram(EX2, 2), gram(EX2)
    close(by_module[1], [[9.0, -12], [-12, 17]])
    close(whole[0], [[14.0, -8], [-8, 22]])
    close(module_cosines(whole)[0, 0, 1], -0.456, 1e-3)
    close(module_cosines(by_module)[:, 0, 1], [0.8, -0.970], 1e-3)
    close(surgery_weights(by_module), [[1.0, 1], [2.333333, 1.705882]])
    close(surgery_weights(whole), [[1.571429, 1.363636]])
    table = {
        "sum": ([3.0, 3, -1, 1], [[9.0, -3], [9, 5]], 4.4721),
        "global": ([4.298701, 4.506494, -0.740260, 1.363636], [[13.3117, -2.2208], [13.1039, 4.3247]], 6.4183),
        "mgs": ([3.0, 3, 0.176471, 1.705882], [[9.0, 0.529412], [9, 1]], 4.5762),
    }
    for name, (expected, products, norm) in table.items():
        weights = surgery_weights(by_module if name == "mgs" else whole, method="sum" if name == "sum" else "pcgrad")
        found = combined(EX2, weights)
        close(found, expected)
        close((EX2 * found).unflatten(1, (2, 2)).sum(2), products, 1e-4)
        close(found.norm(), norm, 1e-4)
    close(projected(EX2[:, 2:], fixed_orders(2)), [0.176471, 1.705882])
    close(mgda_weights(by_module)[1], [0.58, 0.42])  # the shortest combination
    close(combined(EX2[:, 2:], mgda_weights(by_module)[1:]), [0.06, 0.42])


def test_the_order_matters_with_three_domains() -> None:  # card, Ex 3
    whole = gram(EX3)
    orders = torch.tensor([[[1, 2], [0, 2], [0, 1]], [[1, 2], [2, 0], [1, 0]]])
    weights = surgery_weights(whole.expand(2, -1, -1), orders)
    close(weights, [[3.0, 2.5, 1.7], [3.7, 2, 1.5]])
    close(weights @ EX3, [[-1.2, -0.9], [0.2, -1.0]])
    close(surgery_weights(whole[0], orders[0]) @ EX3, [-1.2, -0.9])
    assert torch.equal(orders[0], fixed_orders(3))


@pytest.mark.parametrize("domains", [2, 3, 4, 5, 6])
def test_the_literal_projection(domains: int) -> None:
    """Modules of different sizes by themselves, random orders, zero gradients, parallel and opposite ones."""
    modules = []
    for seed in range(40):
        gradients = random_gradients(domains, (3, 7, 50)[seed % 3], seed)
        if seed % 4 == 1:
            gradients[seed % domains] = 0
        if seed % 4 == 2:
            gradients[-1] = -0.5 * gradients[0]
        modules.append(gradients)
    orders = draw_orders(3, len(modules), domains)
    weights = surgery_weights(torch.stack([part @ part.T for part in modules]), orders)
    for gradients, order, found in zip(modules, orders, weights, strict=True):
        close(found @ gradients, projected(gradients, order), 1e-10)
    for number, gradients in enumerate(modules):  # at once or apart: the same
        assert torch.equal(surgery_weights(gradients @ gradients.T, orders[number]), weights[number])


def test_with_two_domains_no_module_loses_to_first_order() -> None:  # card, 2.5.1
    gradients = random_gradients(2, 600, 0)
    K = gram(gradients, 120)
    weights = surgery_weights(K)
    gains = (weights[:, None] @ K)[:, 0]  # <G, g_i> of each module
    cosine, squares = module_cosines(K)[:, 0, 1], K.diagonal(dim1=1, dim2=2)
    conflict = cosine < 0
    assert 40 < conflict.sum() < 80
    close(gains[conflict], (squares * (1 - cosine.square())[:, None])[conflict], 1e-10)
    close(gains[~conflict], (squares + K[:, 0, 1:])[~conflict], 1e-10)
    assert (gains >= 0).all()


def test_with_three_domains_a_few_modules_do() -> None:  # card, 2.5.2: 3.5 % of random triples in R^5
    K = gram(random_gradients(3, 100_000, 0), 20_000)
    weights = surgery_weights(K, draw_orders(0, len(K), 3))
    lost = ((weights[:, None] @ K)[:, 0] < -1e-9).any(1).double().mean()
    close(lost, 0.035, 0.008)


def test_facts() -> None:  # card, 2.5.3 and 2.5.4
    agree = random_gradients(3, 20, 0).abs()
    close(surgery_weights(agree @ agree.T), [1.0, 1, 1], 0)
    gradients = random_gradients(3, 20, 1)
    K = gradients @ gradients.T
    for scale in (1e-6, 1e6):
        close(surgery_weights(scale**2 * K), surgery_weights(K), 1e-9)
    opposite = torch.stack([gradients[0], -2.5 * gradients[0]])
    close(surgery_weights(opposite @ opposite.T) @ opposite, [0.0] * 20, 1e-12)


def test_a_gradient_is_not_bent_by_itself() -> None:  # card, 2.5.5: the upstream codes include it
    told_apart = 0
    for seed in range(50):
        gradients = random_gradients(3, 2, seed)
        orders = fixed_orders(3)
        close(surgery_weights(gradients @ gradients.T, orders) @ gradients, projected(gradients, orders))
        with_itself = sum(projected_one(gradients, own, [*orders[own].tolist(), own]) for own in range(3))
        told_apart += not torch.allclose(torch.as_tensor(with_itself), projected(gradients, orders), atol=1e-3)
    assert told_apart >= 3


def projected_one(gradients: Tensor, own: int, others: list[int]) -> Tensor:
    left = gradients[own].clone()
    for other in others:
        dot = left @ gradients[other]
        if dot < 0:
            left = left - dot / (gradients[other] @ gradients[other]) * gradients[other]
    return left


def test_the_parallel_projection_is_another_one() -> None:  # the authors' test script, card, Ex 3
    found = torch.zeros(2, dtype=torch.float64)
    for own in range(3):
        left = EX3[own].clone()
        for other in range(3):
            dot = EX3[own] @ EX3[other]
            if other != own and dot < 0:
                left = left - dot / (EX3[other] @ EX3[other]) * EX3[other]
        found += left
    close(found, [-0.4, -0.8])
    pair = EX2[:, 2:]
    one = sum(pair[i] - (pair[i] @ pair[1 - i]) / (pair[1 - i] @ pair[1 - i]) * pair[1 - i] for i in range(2))
    close(surgery_weights(pair @ pair.T) @ pair, one.tolist(), 1e-12)  # with two domains the same


@pytest.mark.parametrize("method", ["pcgrad", "gradvac", "cagrad", "mgda", "sum"])
def test_one_gradient_stays_as_it_is(method: str) -> None:
    one = torch.tensor([[4.0]], dtype=torch.float64)
    close(surgery_weights(one, method=method), [1.0], 0)  # type: ignore[arg-type]
    alone = torch.zeros(3, 3, dtype=torch.float64)
    alone[1, 1] = 2.0
    close(surgery_weights(alone, method=method), [1.0, 1, 1], 0)  # type: ignore[arg-type]
    close(surgery_weights(torch.zeros(3, 3), method=method), [1.0, 1, 1], 0)  # type: ignore[arg-type]


def test_the_guard_is_relative() -> None:
    """Tiny gradients are gradients; noise beside a large one is none. The authors' bound is absolute."""
    pair = torch.tensor([[1.0, 0], [-1, 1]], dtype=torch.float64)
    tiny = 1e-9 * pair
    close(surgery_weights(tiny @ tiny.T), [2.0, 1.5], 1e-9)
    close(surgery_weights(tiny @ tiny.T, compat=True), [1.0, 1.0], 0)
    noise = torch.tensor([[1.0, 0], [-1e-7, 1e-7]], dtype=torch.float64)
    close(surgery_weights(noise @ noise.T), [1.0, 1.0], 0)
    close(surgery_weights(noise.mul(1e3) @ noise.mul(1e3).T, compat=True), [1.0, 5e6 + 1], 1e-3)


@pytest.mark.parametrize("domains", [2, 3, 5])
def test_gradvac(domains: int) -> None:
    """Against its definition, over three steps; a mean of 0 is PCGrad."""
    state, K = None, torch.empty(0)
    expected_means = np.zeros((4, domains, domains))
    for step in range(3):
        gradients = [random_gradients(domains, 6, 10 * step + module) for module in range(4)]
        K = torch.stack([part @ part.T for part in gradients])
        orders = draw_orders(step, 4, domains)
        if step == 0:
            close(gradvac_weights(K, None, orders, 0.0).weights, surgery_weights(K, orders), 1e-10)
            close(surgery_weights(K, orders, "gradvac"), surgery_weights(K, orders), 1e-10)
        weights, state = gradvac_weights(K, state, orders, 0.5)
        for module, part in enumerate(gradients):
            total = torch.zeros(6, dtype=torch.float64)
            for own in range(domains):
                left = part[own].clone()
                for other in orders[module, own].tolist():
                    size, theirs = float(left.norm()), float(part[other].norm())
                    cosine = float(left @ part[other]) / (size * theirs)
                    mean = expected_means[module, own, other]
                    if cosine < mean:
                        rest = math.sqrt(1 - mean**2)
                        factor = size * (mean * math.sqrt(1 - cosine**2) - cosine * rest) / (theirs * rest)
                        left = left + factor * part[other]
                        close((left @ part[other]) / (left.norm() * theirs), mean, 1e-9)
                    expected_means[module, own, other] = 0.5 * mean + 0.5 * cosine
                total += left
            close(weights[module] @ part, total.tolist(), 1e-9)
        close(state, expected_means, 1e-10)
    assert state is not None
    assert (state.diagonal(dim1=1, dim2=2) == 0).all()


def test_mgda_of_two_is_its_closed_form() -> None:
    gradients = random_gradients(2, 300, 0)
    gradients[1] += 0.5 * gradients[0]
    K = gram(gradients, 100)
    gamma = ((K[:, 1, 1] - K[:, 0, 1]) / (K[:, 0, 0] + K[:, 1, 1] - 2 * K[:, 0, 1])).clamp(0, 1)
    assert ((gamma == 0) | (gamma == 1)).any()
    close(mgda_weights(K), torch.stack([gamma, 1 - gamma], 1).tolist(), 1e-12)


def solved(objective: object, domains: int) -> float:
    """Least value over convex combinations, from several starts."""
    starts = [np.ones(domains) / domains, *np.eye(domains) * 0.9 + 0.1 / domains]
    constraint = {"type": "eq", "fun": lambda x: x.sum() - 1}
    settings = {"bounds": [(0, 1)] * domains, "constraints": constraint, "options": {"ftol": 1e-14, "maxiter": 500}}
    return min(minimize(objective, start, method="SLSQP", **settings).fun for start in starts)


@pytest.mark.parametrize(("domains", "width"), [(2, 5), (3, 2), (3, 40), (4, 3), (6, 10)])
def test_mgda_and_cagrad_are_the_minima(domains: int, width: int) -> None:
    """Also where gradients depend on each other, and where 0 is a convex combination."""
    batch = torch.stack([random_gradients(domains, width, seed) for seed in range(12)])
    batch[0, -1] = batch[0, 0]
    batch[1] += 2
    batch[2, 0] = -batch[2, 1:].sum(0)
    K = batch @ batch.transpose(1, 2)
    shortest, towards = mgda_weights(K), cagrad_weights(K, 0.4)
    close(shortest.sum(1), [1.0] * 12, 1e-12)
    assert (shortest >= 0).all()
    for number, k in enumerate(K.numpy()):
        x = shortest[number].numpy()
        assert x @ k @ x <= solved(lambda x, k=k: x @ k @ x, domains) + 1e-7 * k.trace()
        reach = 0.4 * math.sqrt(max(k.sum(), 0))
        x = towards[number].numpy() * (1 + 0.4**2) - 1  # reach * x / |g_x|
        size = math.sqrt(x @ k @ x)
        if size < 1e-6 * math.sqrt(k.trace()):
            continue  # the mixed gradient is a best one already
        assert size == pytest.approx(reach, rel=1e-6)
        x = x / x.sum()

        def objective(x: np.ndarray, k: np.ndarray = k, reach: float = reach) -> float:
            return x @ k.sum(1) + reach * math.sqrt(max(x @ k @ x, 0) + 1e-18)

        assert (x >= -1e-12).all()
        assert objective(x) <= solved(objective, domains) + 1e-7 * k.trace()


def test_cagrad_of_nothing_is_the_sum_and_helps_the_worst() -> None:
    K = gram(random_gradients(3, 300, 0), 20)
    close(cagrad_weights(K, 0.0), [[1.0] * 3] * 20, 0)
    worst = [(w[:, None] @ K)[:, 0].amin(1) for w in (torch.ones(20, 3).double(), 1.25 * cagrad_weights(K, 0.5))]
    assert (worst[1] >= worst[0] - 1e-9).all()


def test_absent_domains_do_not_stop_mgda() -> None:
    gradients = random_gradients(3, 9, 0)
    gradients[1] = 0
    K = gradients @ gradients.T
    two = mgda_weights(K[[0, 2]][:, [0, 2]])
    close(mgda_weights(K)[[0, 2]], two.tolist(), 1e-12)


def test_orders() -> None:
    orders = draw_orders(5, 50, 4)
    assert orders.shape == (50, 4, 3)
    for own in range(4):
        assert (orders[:, own].sort(1).values == fixed_orders(4)[own]).all()
    assert len({tuple(row) for row in orders[:, 0].tolist()}) == 6  # all of them occur
    assert torch.equal(draw_orders(5, 50, 4), orders)
    assert torch.equal(draw_orders(5, 20, 4), orders[:20])  # a module's depend on its number alone
    assert not torch.equal(draw_orders(6, 50, 4), orders)
    assert draw_orders(0, 3, 1).shape == (3, 1, 0)


def test_interference() -> None:
    """Of example 2: m1 agrees, m2 is in conflict; of four parameters two are in each."""
    K = gram(EX2, 2)
    weights = surgery_weights(K)
    found = interference(K, weights, torch.tensor([2, 6]))
    close(found.cosine, -8 / math.sqrt(14 * 22), 1e-12)
    close(found.conflict_ratio, 0.5, 0)
    close(found.conflict_ratio_weighted, 0.75, 0)
    change = combined(EX2, weights) - EX2.sum(0)
    close(found.magnitude, float(change.norm() / EX2.sum(0).norm()), 1e-12)
    close(found.gains, [9.529412 / 14, 10 / 22])
    absent = torch.cat([torch.cat([K, torch.zeros(2, 2, 1)], 2), torch.zeros(2, 1, 3)], 1)
    same = interference(absent, surgery_weights(absent), torch.tensor([2, 6]))
    close(same.conflict_ratio, 0.5, 0)  # a domain without a gradient meets none
    close(same.cosine, float(found.cosine), 1e-12)
    close(same.gains, [9.529412 / 14, 10 / 22, 0.0])
    assert [part.tolist() for part in conflicts(absent)] == [[0, 1], [1, 1]]
    nothing = interference(0 * K, weights, torch.tensor([2, 6]))
    assert all(part.isfinite().all() and not part.any() for part in nothing)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"\(T, T\)"):
        surgery_weights(torch.zeros(3))
    with pytest.raises(ValueError, match="orders"):
        surgery_weights(torch.eye(3), torch.zeros(3, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="method must be"):
        surgery_weights(torch.eye(3), method="pcgrid")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at most 8 domains"):
        mgda_weights(torch.eye(9))
