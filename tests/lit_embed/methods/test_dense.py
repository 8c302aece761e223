"""The contrastive loss of a batch against plain loops over its items; fits are in test_fits.py."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.presets import preset_tokenizer
from lit_embed.methods.dense import Dense
from lit_embed.modules.batches import PairBatch, PairCollator
from lit_embed.modules.tokenization import EncoderConfig, TextTokenizer

TEMPERATURE = 0.3
ITEMS = [  # query, drawn passages (positive first), all known positives, own group only
    ("q1", "ab", "a", False),
    ("q2", "ca", "ca", False),  # a is known to answer q2 and is no negative of it
    ("q3", "ad", "a", False),  # the same positive as q1
    ("q4", "eb", "e", True),
    ("q5", "fg", "fc", False),
]


def _items() -> list[dict[str, Any]]:
    return [
        {"query": query, "query_id": query, "passages": list(ids), "passage_ids": list(ids),
         "positive_ids": list(known), "own_group_only": own, "dataset": "set", "seed": 0}
        for query, ids, known, own in ITEMS
    ]  # fmt: skip


@pytest.fixture(scope="module")
def batch() -> PairBatch:
    return PairCollator(TextTokenizer(preset_tokenizer("tiny-qwen3"), EncoderConfig("eos")))(_items())


@pytest.fixture(scope="module")
def vectors(batch: PairBatch) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(batch.tokens), 8, generator=generator, dtype=torch.float64)


def _cosine(left: list[float], right: list[float]) -> float:
    dot = sum(a * b for a, b in zip(left, right, strict=True))
    return dot / math.sqrt(sum(a * a for a in left) * sum(b * b for b in right))


def _by_loops(vectors: Tensor, symmetric: bool, size: int) -> float:
    names = sorted({letter for _, ids, _, _ in ITEMS for letter in ids}, key="".join(i for _, i, _, _ in ITEMS).index)
    queries = vectors[: len(ITEMS), :size].tolist()
    passages = dict(zip(names, vectors[len(ITEMS) :, :size].tolist(), strict=True))
    forward, backward = [], []
    for (_, ids, known, own), query in zip(ITEMS, queries, strict=True):
        positive = ids[0]
        candidates = ids if own else names
        against = [name for name in candidates if name == positive or name not in known]
        scores = {name: _cosine(query, passages[name]) / TEMPERATURE for name in against}
        forward.append(math.log(sum(map(math.exp, scores.values()))) - scores[positive])
        others = [
            vector for (_, _, other_known, _), vector in zip(ITEMS, queries, strict=True)
            if vector is query or (positive not in other_known and not own)
        ]  # fmt: skip
        logits = [_cosine(passages[positive], other) / TEMPERATURE for other in others]
        right = _cosine(passages[positive], query) / TEMPERATURE
        backward.append(math.log(sum(map(math.exp, logits))) - right)
    loss = sum(forward) / len(forward)
    return (loss + sum(backward) / len(backward)) / 2 if symmetric else loss


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("matryoshka", [[], [2, 5]])
def test_the_loss_is_that_of_plain_loops(
    batch: PairBatch, vectors: Tensor, symmetric: bool, matryoshka: list[int]
) -> None:
    module = Dense("tiny-qwen3", temperature=TEMPERATURE, symmetric=symmetric, matryoshka=matryoshka)
    sizes = [8, *matryoshka]
    expected = sum(_by_loops(vectors, symmetric, size) for size in sizes) / len(sizes)
    assert float(module.contrastive_loss(vectors, batch)) == pytest.approx(expected, abs=1e-5)


def test_a_known_positive_and_a_stranger_of_a_closed_group_get_no_gradient(batch: PairBatch, vectors: Tensor) -> None:
    module = Dense("tiny-qwen3", temperature=TEMPERATURE)
    for query, passages in {1: "a", 3: "acdfg", 4: "c"}.items():  # columns: a b c d e f g
        queries, documents = vectors[:5].clone().requires_grad_(), vectors[5:].clone().requires_grad_()
        row = [query]
        alone = PairBatch(batch.tokens, 1, batch.targets[row], batch.passage_keys, batch.positive_keys[row],
                          batch.own[row], batch.own_only[row])  # fmt: skip
        module.contrastive_loss(torch.cat([queries[query, None], documents]), alone).backward()
        assert documents.grad is not None
        silent = {"abcdefg"[at] for at in range(7) if not documents.grad[at].any()}
        assert silent == set(passages)


def test_worked_example_of_the_card() -> None:
    """E7: two queries with two passages each; the loss at three temperatures."""
    rows = torch.tensor([[1.0, 0], [0, 1], [0.8, 0.6], [0.6, 0.8], [0, 1], [1, 0]])
    items = [{**item, "passage_ids": ids, "passages": ids, "positive_ids": ids[:1], "own_group_only": False}
             for item, ids in zip(_items(), [["a", "b"], ["c", "d"]], strict=False)]  # fmt: skip
    batch = PairCollator(TextTokenizer(preset_tokenizer("tiny-qwen3"), EncoderConfig("eos")))(items)
    for temperature, loss in ((0.02, 5.000045), (0.1, 1.142971), (1.0, 1.149748)):
        module = Dense("tiny-qwen3", temperature=temperature)
        assert float(module.contrastive_loss(rows, batch)) == pytest.approx(loss, abs=1e-5)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, r"temperature must be above 0, got 0\.0"),
        ({"temperature": -1.0}, "temperature must be above 0"),
        ({"temperature": float("nan")}, "temperature must be above 0"),
        ({"matryoshka": [16, 0]}, "matryoshka lengths must be at least 1, got 0"),
        ({"max_grad_norm": -1.0}, "max_grad_norm must be above 0"),
    ],
)
def test_bad_settings_are_errors(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Dense("tiny-qwen3", **settings)


def test_matryoshka_lengths_fit_the_vectors() -> None:
    module = Dense("tiny-qwen3", matryoshka=[16, 65], encoder=EncoderConfig(dimensions=64))
    with pytest.raises(InputError, match="matryoshka lengths must be at most 64, the length of the vectors, got 65"):
        module.configure_model()


def test_the_model_is_built_once() -> None:
    module = Dense("tiny-qwen3")
    module.configure_model()
    encoder = module.encoder
    module.configure_model()
    assert module.encoder is encoder
