"""Forking tokens, KL-Cov and Clip-Cov: the tokens that they choose in a mini-batch or a micro-batch, and the loss."""

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from update_in_loops import Chosen, Replay

from lit_rl.methods.grpo import GRPO
from lit_rl.methods.ppo import PPO
from lit_rl.modules.config import CriticConfig, ExplorationConfig, LossConfig, UpdateConfig
from lit_rl.modules.exploration import Exploration, Selection

SCOPES = ("batch", "micro")
TWO_CHUNKS = UpdateConfig(epochs=1, mini_batches=2, micro_tokens=20, layout="sorted")
Token = tuple[tuple[int, int], float, float, float]


class Spy:
    """What was chosen in each optimizer step, and the chunks that it had."""

    def __init__(self, module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        self.chosen: list[list[tuple[list[int], Selection]]] = []
        select, step, chunk_loss = Exploration.select, module._step, module.chunk_loss
        self.rows: list[int] = []

        def watched(term: Any, *args: Any) -> Selection:
            found = select(term, *args)
            self.chosen[-1].append((self.rows, found))
            return found

        def begin(experience: Any, rows: list[int], *rest: Any) -> None:
            self.chosen.append([])
            self.rows = rows
            step(experience, rows, *rest)

        def loss(chunk: Any, *rest: Any) -> Any:
            self.rows = chunk.rows
            return chunk_loss(chunk, *rest)

        monkeypatch.setattr(Exploration, "select", watched)
        module._step, module.chunk_loss = begin, loss

    def tokens(self, step: int, scope: str, part: str) -> list[tuple[list[int], Chosen]]:
        """For each scope of a step its rows and the tokens chosen there."""
        found = []
        for rows, selection in self.chosen[step]:
            places = getattr(selection, part).nonzero().tolist()
            numbers = range(10_000) if scope == "batch" else rows  # over a mini-batch all rows have their places
            found.append((rows, {(numbers[place], token) for place, token in places}))
        return found


def replay(
    scope: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, loss: LossConfig, method: Any = GRPO, **settings: Any
) -> tuple[Replay, Spy]:
    term = ExplorationConfig(scope=scope, **settings)
    more = {"critic": CriticConfig(lr=0.05)} if method is PPO else {}
    module = worker.build(method, loss=loss, exploration=term, update=TWO_CHUNKS, **more)
    spy = Spy(module, monkeypatch)
    found = Replay(module, folder)
    assert len(spy.chosen) == 2
    assert all(len(calls) == 1 if scope == "batch" else len(calls) > 1 for calls in spy.chosen)
    return found, spy


def covariances(tokens: Sequence[Token]) -> dict[tuple[int, int], float]:
    if not tokens:
        return {}
    log_prob = statistics.fmean(token[2] for token in tokens)
    advantage = statistics.fmean(token[3] for token in tokens)
    return {token[0]: (token[3] - advantage) * (token[2] - log_prob) for token in tokens}


def check_largest(chosen: Chosen, values: dict[tuple[int, int], float], count: int) -> None:
    """By value, as some are equal up to rounding: all covariances of a single response are 0."""
    found = sorted((values[token] for token in chosen), reverse=True)
    assert found == pytest.approx(sorted(values.values(), reverse=True)[:count], abs=2e-6)


def joined(parts: Sequence[tuple[list[int], Chosen]]) -> Chosen:
    return {token for _, chosen in parts for token in chosen}


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("reduction", ["token_mean", pytest.param("seq_mean_token_mean", marks=pytest.mark.slow)])
def test_forking_keeps_the_tokens_of_highest_entropy(
    scope: str, reduction: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The policy's loss is averaged over them, the divergence over all tokens."""
    loss = LossConfig(kl_coef=0.3, reduction=reduction)
    found, spy = replay(scope, monkeypatch, tmp_path, loss, kind="forking", share=0.3)
    for number, (rows, record) in enumerate(found.steps()):
        parts = spy.tokens(number, scope, "learned")
        for members, chosen in parts:
            entropies = {token[0]: token[1] for token in found.reference.tokens(members)}
            check_largest(chosen, entropies, max(1, int(0.3 * len(entropies) + 0.9999)))
        assert sorted(row for members, _ in parts for row in members) == sorted(rows)
        found.check(record, found.reference.loss(rows, learned=joined(parts)))


@pytest.mark.parametrize("method", [GRPO, pytest.param(PPO, marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", SCOPES)
def test_kl_cov_holds_the_tokens_of_largest_covariance(
    scope: str, method: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loss = LossConfig(dual_clip=3.0)
    found, spy = replay(scope, monkeypatch, tmp_path, loss, method, kind="kl_cov", cov_percent=20.0)
    for number, (rows, record) in enumerate(found.steps()):
        parts = spy.tokens(number, scope, "held")
        for members, chosen in parts:
            values = covariances(found.reference.tokens(members))
            check_largest(chosen, values, max(1, int(len(values) * 0.2)))
        assert joined(parts)
        found.check(record, found.reference.loss(rows, held=joined(parts)))


@pytest.mark.parametrize("reduction", ["token_mean", pytest.param("seq_mean_token_mean", marks=pytest.mark.slow)])
@pytest.mark.parametrize("scope", SCOPES)
def test_clip_cov_takes_some_tokens_between_two_bounds_out(
    scope: str, reduction: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is left is divided as before."""
    bounds: dict[str, Any] = {"cov_ratio": 0.2, "cov_low": 0.05, "cov_high": 0.6}
    loss = LossConfig(kl_coef=0.3, reduction=reduction)
    found, spy = replay(scope, monkeypatch, tmp_path, loss, kind="clip_cov", **bounds)
    taken_out = 0
    for number, (rows, record) in enumerate(found.steps()):
        learned = set[tuple[int, int]]()
        for members, chosen in spy.tokens(number, scope, "learned"):
            tokens = found.reference.tokens(members)
            values = covariances(tokens)
            candidates = {token for token, value in values.items() if 0.05 < value < 0.6}
            taken = values.keys() - chosen
            assert taken <= candidates
            assert len(taken) == min(len(candidates), max(1, int(0.2 * len(tokens))))
            taken_out += len(taken)
            learned |= chosen
        found.check(record, found.reference.loss(rows, learned=learned))
    assert taken_out > 0


def test_a_scope_without_tokens_is_no_error() -> None:
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    for kind in ("forking", "kl_cov", "clip_cov"):
        term = Exploration(ExplorationConfig(kind=kind), 100)  # type: ignore[arg-type]
        chosen = term.select(torch.zeros(2, 3), torch.zeros(2, 3), torch.zeros(2, 3), nothing, 0)
        assert not chosen.learned.any()
        assert not chosen.held.any()
    forking = Exploration(ExplorationConfig(kind="forking"), 100)
    assert [forking.kept_tokens([count]) for count in (0, 1, 5, 6, 10, 11)] == [0, 1, 1, 2, 2, 3]  # card, section 5
    assert forking.kept_tokens([5, 0, 6]) == 3


def test_the_adaptive_coefficient_goes_towards_the_target() -> None:
    term = Exploration(ExplorationConfig(kind="adaptive_entropy", target=0.5, adapt=0.1), 100)
    assert term.adapted(0.2, 0.4) == pytest.approx(0.3)
    assert term.adapted(0.2, 0.6) == pytest.approx(0.1)
    assert term.adapted(0.05, 0.6) == 0.0
