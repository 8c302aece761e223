import math

import pytest
import torch
from torch import Tensor

from lit_embed.functional.losses import (
    candidate_mask,
    info_nce,
    multiple_negatives_ranking,
    per_query_distillation,
    per_query_info_nce,
    similarity,
    symmetric_info_nce,
)

QUERIES = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
POSITIVES = torch.tensor([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]])
NEGATIVES = torch.tensor([[0.0, 1.0], [0.6, 0.8], [-1.0, 0.0]])
ALL = ("query_to_passage", "passage_to_query", "query_to_query", "passage_to_passage")


def close(actual: Tensor, expected: float) -> None:
    torch.testing.assert_close(actual, torch.tensor(expected), atol=2e-6, rtol=2e-7)


@pytest.mark.parametrize(
    ("temperature", "per_query", "mean"),
    [
        (0.02, (10.000045, 0.000045), 5.000045),
        (0.1, (2.142971, 0.142971), 1.142971),
        (1.0, (1.249748, 1.049748), 1.149748),
    ],
)
def test_info_nce_with_groups_card_e7(temperature: float, per_query: tuple[float, float], mean: float) -> None:
    passages = torch.tensor([[0.8, 0.6], [0.6, 0.8], [0.0, 1.0], [1.0, 0.0]])
    targets = torch.tensor([0, 2])
    losses = per_query_info_nce(torch.eye(2), passages, temperature, targets)
    torch.testing.assert_close(losses, torch.tensor(per_query), atol=1e-6, rtol=0)
    close(info_nce(torch.eye(2), passages, temperature, targets), mean)


def test_info_nce_of_orthonormal_pairs() -> None:  # scores are [[1, 0], [0, 1]] / 0.5, so each row costs ln(1 + e^-2)
    close(info_nce(torch.eye(2), torch.eye(2), 0.5), 0.126928)


@pytest.mark.parametrize(
    ("scale", "pairs", "triplets"), [(20, 3.753052, 4.372398), (1, 0.996814, 1.583484), (50, 9.333460, 10.273406)]
)
def test_ranking_family_forward(scale: float, pairs: float, triplets: float) -> None:
    close(multiple_negatives_ranking(QUERIES, POSITIVES, scale), pairs)
    close(multiple_negatives_ranking(QUERIES, torch.cat([POSITIVES, NEGATIVES]), scale), triplets)
    close(info_nce(QUERIES, POSITIVES, 1 / scale), pairs)
    close(info_nce(QUERIES, torch.cat([POSITIVES, NEGATIVES]), 1 / scale), triplets)


def test_ranking_family_directions() -> None:
    triplets = torch.cat([POSITIVES, NEGATIVES])
    both = ALL[:2]
    close(multiple_negatives_ranking(QUERIES, POSITIVES, directions=both), 3.753052)
    close(multiple_negatives_ranking(QUERIES, triplets, directions=both), 4.062725)
    close(symmetric_info_nce(QUERIES, triplets, 1 / 20), 4.062725)
    close(multiple_negatives_ranking(QUERIES, POSITIVES, directions=ALL, joint=True), 4.509863)
    close(multiple_negatives_ranking(QUERIES, triplets, directions=ALL, joint=True), 4.998762)


@pytest.mark.parametrize(
    ("hardness", "chosen", "pairs", "triplets"),
    [(9, "in_batch", 9.640419, 13.092477), (5, "own", 3.753052, 4.504497), (9, "all", 9.640419, 13.093483)],
)
def test_ranking_family_hardness(hardness: float, chosen: str, pairs: float, triplets: float) -> None:
    for passages, expected in ((POSITIVES, pairs), (torch.cat([POSITIVES, NEGATIVES]), triplets)):
        close(multiple_negatives_ranking(QUERIES, passages, hardness=hardness, hardness_on=chosen), expected)  # type: ignore[arg-type]


def test_info_nce_equals_a_literal_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, group, width in ((1, 1, 3), (4, 1, 8), (5, 3, 7)):
        queries = torch.randn(batch, width, generator=generator, dtype=torch.float64)
        passages = torch.randn(batch * group, width, generator=generator, dtype=torch.float64)
        mask = torch.rand(batch, batch * group, generator=generator) < 0.3
        targets = torch.arange(batch) * group
        mask[torch.arange(batch), targets] = False
        total = 0.0
        for i in range(batch):
            weights = {}
            for j in range(batch * group):
                if not mask[i, j]:
                    cosine = (queries[i] @ passages[j] / queries[i].norm() / passages[j].norm()).item()
                    weights[j] = math.exp(cosine / 0.1)
            total -= math.log(weights[i * group] / sum(weights.values()))
        close(info_nce(queries, passages, 0.1, targets, mask), total / batch)


def test_candidate_mask_by_hand() -> None:
    targets = torch.tensor([0, 2])
    keys = torch.tensor([7, 8, 9, 7, 8])  # documents 7 and 8 stand twice
    positives = torch.tensor([[7, 5], [9, -1]])
    mask = candidate_mask(keys, positives, targets)
    assert mask.int().tolist() == [[0, 0, 0, 1, 1], [0, 0, 0, 1, 1]]
    mask = candidate_mask(torch.tensor([8, 7, 9]), torch.tensor([[7, 9]]), torch.tensor([1]))
    assert mask.int().tolist() == [[0, 0, 1]]  # a second positive is no negative
    own = torch.tensor([[1, 1, 0, 0, 0], [0, 0, 1, 0, 0]]).bool()
    mask = candidate_mask(keys, positives, targets, own, torch.tensor([True, False]))
    assert mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1]]


def test_masked_duplicate_takes_no_part_in_loss_or_gradient() -> None:
    passages = torch.cat([POSITIVES, POSITIVES[:1]]).requires_grad_()
    mask = candidate_mask(torch.tensor([1, 2, 3, 1]), torch.tensor([[1], [2], [3]]), torch.arange(3))
    losses = per_query_info_nce(QUERIES, passages, 0.05, mask=mask)
    torch.testing.assert_close(losses, per_query_info_nce(QUERIES, POSITIVES, 0.05))
    (gradient,) = torch.autograd.grad(losses.sum(), passages)
    assert gradient[3].abs().max() == 0
    assert gradient[1].abs().max() > 0


def test_half_precision_embeddings_give_float32_losses() -> None:
    assert info_nce(QUERIES.bfloat16(), POSITIVES.bfloat16()).dtype == torch.float32


def test_errors_name_the_value() -> None:
    with pytest.raises(ValueError, match="temperature must be above 0, got -1"):
        info_nce(QUERIES, POSITIVES, -1)
    with pytest.raises(ValueError, match="got 2 passages for 3 queries"):
        info_nce(QUERIES, POSITIVES[:2])
    with pytest.raises(ValueError, match="query_to_passage"):
        multiple_negatives_ranking(QUERIES, POSITIVES, directions=("query_to_query",))


def test_contrastive_loss_of_the_boom_card() -> None:
    """B = 2, g = 2, temperature .02; the own-group variant agrees, as far negatives carry no weight."""
    logits = torch.tensor([[0.80, 0.60, 0.10, 0.00], [0.20, 0.30, 0.70, 0.65]], dtype=torch.float64) / 0.02
    groups, one_hot = torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0.0, -math.inf]] * 2)
    losses = per_query_distillation(logits, groups, one_hot)
    torch.testing.assert_close(losses, torch.tensor([4.5399e-5, 0.0788897]), atol=1e-7, rtol=1e-4)
    close(losses.mean(), 0.0394676)
    strangers = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0]]).bool()
    torch.testing.assert_close(per_query_distillation(logits, groups, one_hot, strangers), losses, atol=1e-7, rtol=0)


def test_distillation_of_the_boom_card() -> None:
    logits, teacher = torch.tensor([[2.0, 1.0, 0.0]]), torch.tensor([[0.7, 0.3]]).log()
    groups = torch.tensor([[0, 1]])
    close(per_query_distillation(logits, groups, teacher)[0], 0.379303)
    close(per_query_distillation(logits, groups, torch.tensor([[0.0, -math.inf]]))[0], 0.407606)
    close(per_query_distillation(logits, groups, torch.tensor([[-100.0, 0.0]]))[0], 0.313262)  # of the others alone


def test_distillation_equals_a_literal_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for batch, group, count in ((1, 1, 1), (3, 2, 9), (4, 5, 20)):
        logits = torch.randn(batch, count, generator=generator, dtype=torch.float64)
        teacher = torch.randn(batch, group, generator=generator, dtype=torch.float64)
        groups = torch.stack([torch.randperm(count, generator=generator)[:group] for _ in range(batch)])
        mask = torch.rand(batch, count, generator=generator) < 0.3
        if group > 2:
            groups[0, 2] = groups[0, 1]  # drawn twice: counts once
        expected = []
        for i in range(batch):
            own: list[int] = []
            for column in groups[i].tolist():
                if column not in own:
                    own.append(column)
            shares = [math.exp(teacher[i, groups[i].tolist().index(column)]) for column in own]
            left = [j for j in range(count) if not mask[i, j] or j in own]
            loss = 0.0
            for place, column in enumerate(own):
                total = sum(math.exp(logits[i, j]) for j in left if j not in own[:place])
                loss += shares[place] / sum(shares) * (math.log(total) - float(logits[i, column]))
            expected.append(loss)
        found = per_query_distillation(logits, groups, teacher, mask)
        torch.testing.assert_close(found, torch.tensor(expected), atol=1e-5, rtol=0)


def test_distillation_with_all_weight_on_the_positive_is_info_nce() -> None:
    passages = torch.cat([POSITIVES, NEGATIVES])
    groups = torch.stack([torch.arange(3), torch.arange(3, 6)], dim=1)
    logits = similarity(QUERIES, passages) / 0.05
    teacher = torch.tensor([[0.0, -math.inf]] * 3)
    torch.testing.assert_close(per_query_distillation(logits, groups, teacher), per_query_info_nce(QUERIES, passages))
    logits = logits.requires_grad_()
    per_query_distillation(logits, groups, teacher).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
