"""Tasks that compare two texts."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from lit_embed.retrieval.tasks.task import EvalTask, TaskType, TextVectors


@dataclass(frozen=True, kw_only=True)
class Sts(EvalTask):
    """Correlation of the cosine with how alike two texts are said to be.

    An encoder that gives all pairs one cosine scores 0.

    Args:
        pairs: Ids of two texts and their gold score.
    """

    type: ClassVar[TaskType] = "sts"
    main: ClassVar[str] = "spearman"

    pairs: Sequence[tuple[str, str, float]]

    def check(self) -> None:
        self.known((text_id for first, second, _ in self.pairs for text_id in (first, second)), self.queries, "pairs")
        gold = {score for _, _, score in self.pairs}
        if any(score != score or abs(score) == float("inf") for score in gold):
            raise self.error("a gold score is not finite; drop the pair or mend it", "pairs")
        if len(gold) < 2:
            raise self.error(
                "all gold scores are equal, so nothing correlates; give pairs of different scores", "pairs"
            )

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        from scipy.stats import pearsonr, spearmanr

        cosines = _cosines(self, queries, [(first, second) for first, second, _ in self.pairs]).numpy()
        gold = [score for _, _, score in self.pairs]
        if cosines.min() == cosines.max():
            return {"spearman": 0.0, "pearson": 0.0}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of cosines that nearly agree
            return {"spearman": float(spearmanr(cosines, gold)[0]), "pearson": float(pearsonr(cosines, gold)[0])}


@dataclass(frozen=True, kw_only=True)
class PairClassification(EvalTask):
    """Average precision of the cosine at telling pairs that belong together from others.

    Args:
        pairs: Ids of two texts and 1 where they belong together, else 0; both occur.
    """

    type: ClassVar[TaskType] = "pair_classification"
    main: ClassVar[str] = "ap"

    pairs: Sequence[tuple[str, str, int]]

    def check(self) -> None:
        self.known((text_id for first, second, _ in self.pairs for text_id in (first, second)), self.queries, "pairs")
        if {label for _, _, label in self.pairs} != {0, 1}:
            raise self.error("needs pairs labelled 1 and pairs labelled 0, and no others", "pairs")

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        from sklearn.metrics import average_precision_score, roc_auc_score

        cosines = _cosines(self, queries, [(first, second) for first, second, _ in self.pairs]).numpy()
        labels = [label for _, _, label in self.pairs]
        return {
            "ap": float(average_precision_score(labels, cosines)),
            "roc_auc": float(roc_auc_score(labels, cosines)),
        }


def _cosines(task: EvalTask, vectors: TextVectors, pairs: Sequence[tuple[str, str]]) -> Tensor:
    """Cosine of each pair, float32 ``(N,)``: equal vectors tie whatever the rounding before."""
    first, second = (task.unit(vectors, side).double() for side in zip(*pairs, strict=True))
    return (first * second).sum(1).float()
