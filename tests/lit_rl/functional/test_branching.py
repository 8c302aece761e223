import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_rl.functional import branching
from lit_rl.functional.branching import (
    branching_scores,
    clustered_semantic_entropy,
    largest,
    mean_cosine,
    semantic_divergence,
)
from lit_rl.functional.exploration import entropy, semantic_entropy

VARIANTS = ("allpairs", "offdiag", "rao")
POSITIONS = {  # name: probabilities, embeddings, entropy, allpairs, offdiag, rao
    "synonyms": ([0.5, 0.5], [[1, 0], [1, 0]], 0.693147, -0.693147, -0.346574, 0),
    "near-deterministic": ([0.99, 0.01], [[1, 0], [0, 1]], 0.056002, -0.054893, 0, 0.001109),
    "orthogonal": ([0.5, 0.5], [[1, 0], [0, 1]], 0.693147, -0.346574, 0, 0.346574),
    "mixed": ([0.5, 0.3, 0.2], [[1, 0], [1, 0], [0, 1]], 1.029653, -0.700164, -0.308896, 0.329489),
    "opposite": ([0.5, 0.5], [[1, 0], [-1, 0]], 0.693147, 0, 0.346574, 0.693147),
    "trio": ([0.6, 0.3, 0.1], [[3, 4, 0], [0, 1, 0], [-1, 0, 1]], 0.897946, -0.625947, -0.212892, 0.271998),
}


def scores(name: str, **settings: Any) -> Any:
    probabilities, embeddings = (torch.tensor(values, dtype=torch.float32) for values in POSITIONS[name][:2])
    return branching_scores(probabilities.log(), embeddings, **{"top_k": len(probabilities), **settings})


@pytest.mark.parametrize("name", POSITIONS)
def test_positions_of_the_card(name: str) -> None:
    for variant, expected in zip(VARIANTS, POSITIONS[name][3:], strict=True):
        found = scores(name, variant=variant)
        assert float(found.entropy) == pytest.approx(POSITIONS[name][2], abs=1e-5)
        assert float(found.semantic_entropy) == pytest.approx(expected, abs=1e-5)
        assert float(found.divergence * found.entropy) == pytest.approx(float(found.semantic_entropy))


def test_where_the_card_branches() -> None:
    found = {
        variant: [float(scores(name, variant=variant).semantic_entropy) for name in POSITIONS][:5]
        for variant in VARIANTS
    }
    entropies = [float(scores(name).entropy) for name in POSITIONS][:4]
    assert entropies.index(max(entropies)) == 3
    assert found["allpairs"].index(max(found["allpairs"][:4])) == 1  # the one without a choice
    assert found["rao"].index(max(found["rao"][:4])) == 2
    assert sorted(found["offdiag"][:4])[2:] == pytest.approx([0, 0], abs=1e-6)
    assert all(values.index(max(values)) == 4 for values in found.values())


def test_truncation_of_the_card() -> None:
    found = scores("trio", top_k=2, entropy_support="topk")
    assert float(found.entropy) == pytest.approx(0.667687, abs=1e-5)
    assert float(found.semantic_entropy) == pytest.approx(-0.192294, abs=1e-5)
    assert float(found.divergence) == pytest.approx(0.45 - 0.738, abs=1e-5)
    rao = scores("trio", top_k=2, entropy_support="topk", variant="rao")
    assert float(rao.semantic_entropy) == pytest.approx(0.048073, abs=1e-5)
    assert float(rao.divergence) == pytest.approx(0.81 - 0.738, abs=1e-5)
    for token, expected in ((0, 0.667687), (1, 0.667687), (2, 0.897946)):  # the third lies outside the top two
        drawn = scores("trio", top_k=2, entropy_support="topk", sampled=torch.tensor(token))
        assert float(drawn.entropy) == pytest.approx(expected, abs=1e-5)
    assert float(scores("trio", top_k=2).entropy) == pytest.approx(0.897946, abs=1e-5)


def loop(logits: Tensor, embeddings: Tensor, top_k: int, variant: str) -> tuple[float, float]:
    """The equations as they are written, in float64."""
    p = logits.double().softmax(0)
    full = -sum(x * math.log(x) for x in p.tolist() if x > 0)
    best = p.topk(top_k).indices.tolist()
    total, unit = 0.0, embeddings.double() / embeddings.double().norm(dim=1, keepdim=True)
    for v in best:
        for w in best:
            cosine = float(unit[v] @ unit[w])
            if variant == "rao":
                total += float(p[v] * p[w]) * (1 - cosine)
            elif variant == "allpairs" or v != w:
                total -= float(p[v] * p[w]) * cosine
    return full, total


@pytest.mark.parametrize("variant", VARIANTS)
def test_scores_against_the_equations(variant: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lit_rl.functional.branching.CPU_CHUNK", 5 * 30)  # several chunks, the last one short
    generator = torch.Generator().manual_seed(0)
    logits, embeddings = 3 * torch.randn(3, 4, 30, generator=generator), torch.randn(30, 8, generator=generator)
    found = branching_scores(logits, embeddings, 6, variant)
    unit = torch.nn.functional.normalize(embeddings, dim=1)
    torch.testing.assert_close(branching_scores(logits, unit, 6, variant, normalised=True), found)
    torch.testing.assert_close(found.entropy, entropy(logits))
    assert torch.equal(semantic_entropy(logits, embeddings, 6, variant), found.semantic_entropy)
    assert torch.equal(semantic_divergence(logits, embeddings, 6, variant), found.divergence)
    for row in range(3):
        for position in range(4):
            expected = loop(logits[row, position], embeddings, 6, variant)
            got = float(found.entropy[row, position]), float(found.divergence[row, position])
            assert got == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(5, 5), (165, 20), (1000, 20), (5003, 7), (4096, 300)])
def test_largest_values_in_blocks(vocabulary: int, top_k: int) -> None:
    values = torch.randn(30, vocabulary, generator=torch.Generator().manual_seed(0))
    values[10:20] = values[10:20].round()  # ties
    values[20, 3:] = -math.inf
    found, columns = largest(values, top_k)
    assert torch.equal(values.gather(1, columns), found)
    assert torch.equal(found.sort(descending=True).values, values.topk(top_k).values)
    assert all(len(row.unique()) == top_k for row in columns)


@pytest.mark.parametrize(("vocabulary", "top_k"), [(6, 6), (30, 6), (200, 20), (1000, 20), (5003, 7), (4096, 300)])
@pytest.mark.parametrize("full", [True, False])
def test_compiled_rows_equal_those_of_other_devices(vocabulary: int, top_k: int, full: bool) -> None:
    generator = torch.Generator().manual_seed(vocabulary)
    logits = 4 * torch.randn(40, vocabulary, generator=generator)
    logits[10:20] = logits[10:20].round()  # ties
    logits[20:25, 5:] = -math.inf
    logits[25] = 0
    embeddings, scales = torch.randn(vocabulary, 12, generator=generator), torch.rand(vocabulary, generator=generator)
    drawn = torch.randint(vocabulary, (40,), generator=generator)
    found, expected = torch.empty(4, 40), torch.empty(4, 40)
    for weights in (None, scales):
        for tokens in (None, drawn):
            table = branching._Table(embeddings, weights)
            branching._score_rows_on_cpu(logits, table, top_k, full, tokens, found)
            branching._score_rows(logits, table, top_k, full, tokens, expected)
            distinct = [row for row in range(40) if not 10 <= row <= 25]  # among equal ones either may be compared
            torch.testing.assert_close(found[:, distinct], expected[:, distinct], atol=2e-6, rtol=1e-5)
            same = found[:3] if full or tokens is None else found[1:3]
            torch.testing.assert_close(same, expected[:3] if len(same) == 3 else expected[1:3], atol=2e-6, rtol=1e-5)


def test_compiled_rows_of_broken_logits_and_tokens() -> None:
    logits = torch.randn(3, 400)
    logits[1, 7] = math.nan
    found = branching_scores(logits, torch.randn(400, 4), top_k=20).entropy
    assert found.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="drawn tokens must be below 400, got 0 to 400"):
        branching_scores(logits, torch.randn(400, 4), entropy_support="topk", sampled=torch.tensor([0, 400, 1]))


def test_tokens_without_probability_and_half_precision() -> None:
    logits = torch.tensor([[0.0, -math.inf, -math.inf], [1e4, 0, 0]])
    found = branching_scores(logits, torch.eye(3), top_k=2)
    assert torch.equal(found.entropy, torch.zeros(2))
    assert torch.equal(found.divergence, torch.zeros(2))
    halves = branching_scores(torch.zeros(2, 3).bfloat16(), torch.eye(3).bfloat16(), top_k=3, variant="rao")
    assert halves.entropy.dtype == torch.float32
    torch.testing.assert_close(halves.divergence, torch.full((2,), 2 / 3))
    empty = branching_scores(torch.zeros(0, 3), torch.eye(3), top_k=3)
    assert empty.semantic_entropy.shape == (0,)


def test_diagnostics_of_the_card() -> None:
    found = mean_cosine(torch.tensor([[1, 0], [0.6, 0.8], [0, 1]]))
    assert float(found) == pytest.approx(0.466667, abs=1e-6)
    rows = torch.tensor([[1, 0.0], [5, 0.5], [0, 2], [-1, 0]])  # clusters of 2, 1 and 1
    assert float(clustered_semantic_entropy(rows)) == pytest.approx(1.039721, abs=1e-6)
    assert float(clustered_semantic_entropy(torch.ones(3, 2))) == 0
    chain = torch.tensor([[1, 0.0], [0.92, 0.39], [0.70, 0.71]])  # the third is near the second, which is no first
    assert float(clustered_semantic_entropy(chain)) == pytest.approx(-(2 * math.log(2 / 3) + math.log(1 / 3)) / 3)


def test_mean_cosine_is_that_of_all_pairs() -> None:
    rows = torch.randn(5, 40, 6, generator=torch.Generator().manual_seed(0)) + 0.3
    rows[0, 7] = 0
    cosines = torch.nn.functional.normalize(rows, dim=-1) @ torch.nn.functional.normalize(rows, dim=-1).mT
    expected = cosines.masked_fill(torch.eye(40, dtype=torch.bool), 0).sum((1, 2)) / (40 * 39)
    torch.testing.assert_close(mean_cosine(rows), expected)
    assert float(mean_cosine(rows[1])) == pytest.approx(float(expected[1]))


def test_what_does_not_fit() -> None:
    logits, table = torch.zeros(2, 5), torch.eye(5)
    for top_k in (0, 6):
        with pytest.raises(ValueError, match="top_k must be between 1 and the 5 tokens"):
            semantic_entropy(logits, table, top_k)
    with pytest.raises(ValueError, match="an embedding for each of 5 tokens, got 4"):
        semantic_entropy(logits, table[:4], 2)
    with pytest.raises(ValueError, match="two rows to compare, got 1"):
        mean_cosine(table[:1])


@pytest.mark.parametrize("shared", [0.0, 0.3])
def test_where_each_variant_branches_by_how_alike_the_embeddings_are(shared: float) -> None:
    """Percentile of the entropy at the chosen one of 256 positions, of which some are sure and some are not (card 2.1).

    With isotropic embeddings ``rao`` takes an open position, ``offdiag`` mostly so; with a mean cosine of 0.3 it
    takes a nearly sure one, as ``allpairs`` always does.
    """
    generator = torch.Generator().manual_seed(0)
    found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
    for _ in range(12):
        noise = torch.nn.functional.normalize(torch.randn(500, 64, generator=generator), dim=1)
        common = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
        table = (1 - shared) ** 0.5 * noise + shared**0.5 * common
        assert float(mean_cosine(table)) == pytest.approx(shared, abs=0.03)
        peaks = 4 + 8 * torch.rand(256, 1, generator=generator)  # the top 20 hold nearly all of the mass
        logits = peaks * torch.randn(256, 500, generator=generator)
        entropies = entropy(logits)
        for variant in VARIANTS:
            chosen = semantic_entropy(logits, table, variant=variant).argmax()
            found[variant].append(float((entropies < entropies[chosen]).float().mean()))
    means = {variant: sum(values) / len(values) for variant, values in found.items()}
    assert means["rao"] > 0.95
    assert means["allpairs"] < 0.02
    assert (means["offdiag"] > 0.5) if shared == 0 else (means["offdiag"] < 0.15)
