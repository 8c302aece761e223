"""What can be read off vectors of pictures by a linear map: each attribute of the scene."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

STEPS = 100  # of L-BFGS
PENALTY = 1e-3


def linear_probe(
    train: Tensor, train_labels: Sequence[dict[str, int]], test: Tensor, test_labels: Sequence[dict[str, int]]
) -> dict[str, float]:
    """Accuracy of a logistic regression for each attribute.

    Args:
        train: Vectors ``(N, D)``.
        train_labels: Attributes of each.
        test: Vectors ``(M, D)``.
        test_labels: Attributes of each.

    Returns:
        Share of the test vectors whose attribute is told, by attribute.
    """
    mean, std = train.mean(0), train.std(0).clamp(min=1e-6)
    ours, theirs = ((part - mean) / std for part in (train, test))
    found = {}
    for name in train_labels[0]:
        labels = torch.tensor([row[name] for row in train_labels])
        wanted = torch.tensor([row[name] for row in test_labels])
        classes = int(max(labels.max(), wanted.max())) + 1
        found[name] = float((_fit(ours, labels, classes)(theirs).argmax(1) == wanted).float().mean())
    return found


def _fit(vectors: Tensor, labels: Tensor, classes: int) -> torch.nn.Linear:
    layer = torch.nn.Linear(vectors.shape[1], classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.LBFGS(layer.parameters(), max_iter=STEPS, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(layer(vectors), labels) + PENALTY * layer.weight.square().sum()
        loss.backward()
        return loss

    with torch.enable_grad():
        optimizer.step(closure)
    return layer.requires_grad_(False)
