import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.backbones import BackboneConfig, load_backbone, text_model
from lit_rl.modules.layout import SHARED_LENGTH, Layout, Sequences
from lit_rl.modules.policy import states_before

CPU = torch.device("cpu")
BUDGETS = (1, 40, 100, 10_000)


@cache
def backbone(name: str, attention: Any = "sdpa") -> Any:
    return load_backbone(name, "causal_lm", BackboneConfig(attention=attention, seed=1))


def batch(prompts: list[int], responses: list[int], groups: list[int]) -> Sequences:
    """Random tokens; ``prompts`` are the lengths by group, ``responses`` those by row."""
    draw = random.Random(0)
    texts = [[draw.randrange(10, 1000) for _ in range(length)] for length in prompts]
    return Sequences(
        [texts[group] for group in groups],
        [[draw.randrange(10, 1000) for _ in range(length)] for length in responses],
        groups,
    )


# groups interleaved; an empty response, responses and a prompt of one token, a group of one
MIXED = batch([7, 1, 3, 12], [5, 0, 1, 8, 2, 6, 1, 3, 4], [2, 0, 1, 0, 2, 1, 0, 3, 2])


def plain_states(model: Any, sequences: Sequences, row: int) -> Tensor:
    """States before a row's response tokens, by a forward pass of that row alone."""
    prompt, response = list(sequences.prompts[row]), list(sequences.responses[row])
    states = text_model(model)(input_ids=torch.tensor([prompt + response])).last_hidden_state[0]
    return states[len(prompt) - 1 : len(prompt) + len(response) - 1]


def by_row(model: Any, sequences: Sequences, rows: list[int], budget: int, layout: Layout) -> dict[int, Tensor]:
    found = {}
    for chunk in sequences.chunks(rows, budget, CPU, layout):
        states = states_before(text_model(model), chunk)
        parts = states.split([len(sequences.responses[row]) for row in chunk.rows])
        found |= dict(zip(chunk.rows, parts, strict=True))
    return found


def gradients(model: Any, states: dict[int, Tensor]) -> list[Tensor]:
    """Of a fixed random functional of the states."""
    model.zero_grad()
    total = torch.zeros(())
    for row in sorted(states):
        weights = torch.randn(states[row].shape, generator=torch.Generator().manual_seed(row))
        total = total + (weights * states[row]).sum()
    total.backward()
    return [parameter.grad.clone() for parameter in text_model(model).parameters()]


@pytest.mark.parametrize("name", ["nano-qwen3", "tiny-llama"])
@pytest.mark.parametrize("layout", ["sorted", "shared", "trie"])
def test_states_and_gradients_are_those_of_each_row_alone(name: str, layout: Layout) -> None:
    model = backbone(name)
    rows = list(range(len(MIXED.groups)))
    expected = {row: plain_states(model, MIXED, row) for row in rows}
    wanted = gradients(model, expected)
    for budget in BUDGETS:
        found = by_row(model, MIXED, rows, budget, layout)
        assert sorted(found) == rows
        for row in rows:
            torch.testing.assert_close(found[row], expected[row], atol=1e-5, rtol=0)
        for one, other in zip(gradients(model, found), wanted, strict=True):
            assert float((one - other).norm() / other.norm().clamp(min=1e-9)) < 1e-5


def test_eager_attention_reads_a_shared_prompt_alike() -> None:
    model = backbone("nano-qwen3", "eager")
    rows = [0, 3, 4, 6, 8]
    found = by_row(model, MIXED, rows, 10_000, "shared")
    for row in rows:
        torch.testing.assert_close(found[row], plain_states(model, MIXED, row), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", ["auto", "sorted", "shared", "trie"])
def test_chunks_of_random_rows_hold_each_token_once(layout: Layout, seed: int) -> None:
    draw = random.Random(seed)
    groups = [draw.randrange(5) for _ in range(20)]
    sequences = batch([draw.randint(1, 9) for _ in range(5)], [draw.randint(0, 9) for _ in range(20)], groups)
    rows = draw.sample(range(20), 13)
    for budget in (1, 30, 200):
        seen = []
        for chunk in sequences.chunks(rows, budget, CPU, layout):
            assert chunk.tokens == chunk.input_ids.numel()
            alone = len({groups[row] for row in chunk.rows}) == 1 if chunk.mask is not None else len(chunk.rows) == 1
            assert chunk.tokens <= budget or alone
            at = chunk.input_ids.flatten()[chunk.states].tolist()  # the token before each response token
            before = [
                token
                for row in chunk.rows
                for token in [*sequences.prompts[row], *sequences.responses[row]][len(sequences.prompts[row]) - 1 : -1]
            ]
            assert at == before
            seen += chunk.rows
        assert sorted(seen) == sorted(rows)


def test_the_layout_that_costs_less_is_taken() -> None:
    def masked(prompt: int, response: int) -> bool:
        sequences = batch([prompt], [response] * 4, [0] * 4)
        return sequences.chunks(range(4), 10_000, CPU, "auto")[0].mask is not None

    assert masked(30, 10)  # 66 tokens instead of 156
    assert not masked(2, 30)  # 118 instead of 124: not worth a mask
    assert not masked(SHARED_LENGTH, 10)  # the mask would be too large
    assert masked(200, 100)
    assert not masked(200, 900)  # in a row of 3,796 attention costs 7 times what all else does


def test_equal_chunks_in_a_single_process_need_none_that_idle() -> None:
    chunks = MIXED.chunks(range(9), 40, CPU, "shared", equal=True)
    assert all(chunk.mask is None and chunk.rows for chunk in chunks)
    assert sorted(row for chunk in chunks for row in chunk.rows) == list(range(9))


def test_an_idle_chunk_reads_a_row_and_gives_no_state() -> None:
    chunk = MIXED._idle([4], CPU)
    assert (chunk.rows, chunk.tokens) == ([], 4)
    assert states_before(text_model(backbone("nano-qwen3")), chunk).shape == (0, 64)


def test_rows_are_taken_and_joined() -> None:
    taken = MIXED.take([3, 1])
    assert (taken.groups, taken.responses[1]) == ([0, 0], [])
    whole = Sequences.concatenate([taken, MIXED])
    assert list(whole.groups) == [0, 0, *MIXED.groups]
    assert whole.prompts[2:] == MIXED.prompts


def test_a_rank_without_rows_keeps_the_others_company(monkeypatch: pytest.MonkeyPatch) -> None:
    """With as many idle chunks as the rank with most has chunks; in a single process there are none."""
    sequences = Sequences([[1, 2], [3]], [[4, 5], [6, 7, 8]], [0, 1])
    where = torch.device("cpu")
    assert sequences.chunks([], 10, where, equal=True, spare=1) == []
    monkeypatch.setattr("lit_rl.modules.layout.maximum", lambda value, device: 3)
    chunks = sequences.chunks([], 10, where, equal=True, spare=1)
    assert [chunk.rows for chunk in chunks] == [[]] * 3
    assert [chunk.input_ids.tolist() for chunk in chunks] == [[[3, 6, 7]]] * 3
    assert all(len(chunk.states) == 0 for chunk in chunks)
    assert sequences.chunks([], 10, where, equal=True) == []
