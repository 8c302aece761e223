"""Tasks whose texts have labels."""

import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from lit_embed.retrieval.tasks.task import EvalTask, TaskType, TextVectors


@dataclass(frozen=True, kw_only=True)
class Classification(EvalTask):
    """A logistic regression on a few vectors of each label, averaged over draws, as in MTEB.

    Vectors enter as the encoder gives them; the regression is scikit-learn's, stopped after 100 iterations.

    Args:
        train: Label of each text to fit on; at least two texts a label.
        test: Label of each text to predict.
        per_label: Texts of a label in a draw; all of them where there are fewer.
        draws: Draws to average over.
        seed: Seed of the draws.
    """

    type: ClassVar[TaskType] = "classification"
    main: ClassVar[str] = "accuracy"

    train: Mapping[str, str]
    test: Mapping[str, str]
    per_label: int = 8
    draws: int = 10
    seed: int = 42

    def check(self) -> None:
        for name in ("per_label", "draws"):
            if getattr(self, name) < 1:
                raise self.error(f"must be at least 1, got {getattr(self, name)}", name)
        self.known(self.train, self.queries, "train")
        self.known(self.test, self.queries, "test")
        if not self.test:
            raise self.error("there is nothing to predict; give at least one text", "test")
        _check_labels(self, self.train, "train")
        for text_id, label in self.test.items():
            if label not in self.train.values():
                raise self.error(f"label '{label}' of text '{text_id}' is not among those of train", "test")
        fitted = {self.queries[text_id]: text_id for text_id in self.train}
        for text_id in self.test:
            if self.queries[text_id] in fitted:
                other = fitted[self.queries[text_id]]
                raise self.error(f"text '{text_id}' is also in train, as '{other}'; drop it from one of them", "test")

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        from sklearn.linear_model import LogisticRegression
        from sklearn.metrics import accuracy_score, f1_score

        test_ids = sorted(self.test)
        tested, truth = self.stack(queries, test_ids).numpy(), [self.test[text_id] for text_id in test_ids]
        self.stack(queries, sorted(self.train))  # a bad vector is told whether a draw has it or not
        accuracies, f1s = [], []
        for draw in range(self.draws):
            ids = self.drawn(draw)
            model = LogisticRegression(max_iter=100, random_state=self.seed)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a stop before convergence
                model.fit(self.stack(queries, ids).numpy(), [self.train[text_id] for text_id in ids])
            predicted = model.predict(tested)
            accuracies.append(accuracy_score(truth, predicted))
            f1s.append(f1_score(truth, predicted, average="macro"))
        return {"accuracy": float(np.mean(accuracies)), "f1": float(np.mean(f1s))}

    def drawn(self, draw: int) -> list[str]:
        """Ids of the texts that a draw fits on, ascending."""
        ids: list[str] = []
        for label, of_label in _by_label(self.train).items():
            rng = random.Random(f"{self.seed}/{draw}/{label}")
            ids += rng.sample(of_label, min(self.per_label, len(of_label)))
        return sorted(ids)


@dataclass(frozen=True, kw_only=True)
class Clustering(EvalTask):
    """K-means with as many clusters as labels, on bootstrapped sets, judged by the V-measure, as MTEB's newer protocol.

    Args:
        labels: Label of each text; at least two texts a label.
        sets: Sets to average over.
        size: Texts of a set, drawn with replacement; by default as many as there are texts, at most 2,048.
        seed: Seed of the sets and of k-means.
    """

    type: ClassVar[TaskType] = "clustering"
    main: ClassVar[str] = "v_measure"

    labels: Mapping[str, str]
    sets: int = 10
    size: int | None = None
    seed: int = 42

    def check(self) -> None:
        for name, value in (("sets", self.sets), ("size", 2 if self.size is None else self.size - 1)):
            if value < 1:
                raise self.error(f"must be at least {1 if name == 'sets' else 2}", name)
        self.known(self.labels, self.queries, "labels")
        _check_labels(self, self.labels, "labels")

    def score(self, queries: TextVectors, passages: TextVectors) -> dict[str, float]:
        from sklearn.cluster import KMeans
        from sklearn.metrics import v_measure_score

        ids = sorted(self.labels)
        vectors = self.stack(queries, ids).numpy()
        values = []
        for number in range(self.sets):
            rows = self.drawn(number)
            truth = [self.labels[ids[row]] for row in rows]
            means = KMeans(len(set(truth)), n_init=1, random_state=self.seed + number)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of fewer distinct vectors than clusters
                values.append(v_measure_score(truth, means.fit_predict(vectors[rows])))
        return {"v_measure": float(np.mean(values)), "v_measure_std": float(np.std(values))}

    def drawn(self, number: int) -> list[int]:
        """Rows of the ascending ids that make a set."""
        rng = random.Random(f"{self.seed}/{number}")
        count = len(self.labels)
        return sorted(rng.choices(range(count), k=min(count, 2048) if self.size is None else self.size))


def _by_label(labels: Mapping[str, str]) -> dict[str, list[str]]:
    """Ids of each label, both ascending."""
    groups: dict[str, list[str]] = {label: [] for label in sorted(set(labels.values()))}
    for text_id in sorted(labels):
        groups[labels[text_id]].append(text_id)
    return groups


def _check_labels(task: EvalTask, labels: Mapping[str, str], field: str) -> None:
    groups = _by_label(labels)
    if len(groups) < 2:
        raise task.error(f"has {len(groups)} labels; give at least two", field)
    lonely: Sequence[str] = [label for label, ids in groups.items() if len(ids) < 2]
    if lonely:
        raise task.error(f"label '{lonely[0]}' has one text; give it a second or drop it", field)
