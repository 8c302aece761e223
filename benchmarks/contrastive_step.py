"""One contrastive training step against sentence-transformers' two losses: ``python -m benchmarks.contrastive_step``.

Forward and backward pass from token ids, same weights, same texts, same temperature; the tokens of both sides are made
beforehand. 32 queries of 5-15 tokens, each with a positive and a hard negative of 10-128 tokens (log-normal).
"""

import random
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.backbones import POOLING, save_backbone, sentence_transformer
from benchmarks.harness import (
    alternate,
    announce,
    arguments,
    log_normal_lengths,
    print_table,
    texts,
    words_of_one_token,
)

QUERIES, TEMPERATURE = 32, 0.05
TARGETS = {"plain": 1.5, "cached": 1.8}
TOLERANCE = 1e-5


def batch_texts(words: list[str], seed: int) -> tuple[list[str], list[str], list[str]]:
    """Queries, positives and hard negatives of one batch."""
    generator = random.Random(seed)
    queries = texts(words, [generator.randint(5, 15) for _ in range(QUERIES)], seed)
    documents = texts(words, log_normal_lengths(2 * QUERIES, 45, 0.6, 10, 128, seed), seed + 1)
    return queries, documents[:QUERIES], documents[QUERIES:]


def our_steps(folder: str, family: str, batches: Sequence[tuple[list[str], ...]]) -> tuple[Any, dict[str, Any]]:
    """Our encoder and the two kinds of step; a step runs over all batches and returns their losses."""
    from lit_embed.methods.dense import Dense
    from lit_embed.modules.batches import PairBatch, PairCollator
    from lit_embed.modules.gradcache import cached_backward
    from lit_embed.modules.tokenization import EncoderConfig

    method = Dense(folder, temperature=TEMPERATURE, encoder=EncoderConfig(pooling=POOLING[family][0]))  # type: ignore[arg-type]
    method.configure_model()
    method.train()
    collate = PairCollator(method.encoder.text_tokenizer)
    ready = [collate(_rows(number, *batch)) for number, batch in enumerate(batches)]

    def plain(batch: PairBatch) -> float:
        method.zero_grad()
        loss = method.contrastive_loss(method.encoder(batch.tokens), batch)
        loss.backward()
        return float(loss.detach())

    def cached(batch: PairBatch) -> float:
        method.zero_grad()
        return float(
            cached_backward(method.encoder, batch.tokens, lambda vectors: method.contrastive_loss(vectors, batch))
        )

    steps = {"plain": plain, "cached": cached}
    return method.encoder.model, {name: _over(step, ready) for name, step in steps.items()}


def their_steps(folder: str, family: str, batches: Sequence[tuple[list[str], ...]]) -> tuple[Any, dict[str, Any]]:
    """The same for sentence-transformers, its losses with their default mini-batches."""
    from sentence_transformers.sentence_transformer import losses

    model = sentence_transformer(family, folder)
    model.train()
    ready = [[model.preprocess(column) for column in batch] for batch in batches]
    kinds = {"plain": losses.MultipleNegativesRankingLoss, "cached": losses.CachedMultipleNegativesRankingLoss}

    def step(name: str) -> Callable[[Any], float]:
        loss_of = kinds[name](model, scale=1 / TEMPERATURE)

        def run(features: list[dict[str, Any]]) -> float:
            model.zero_grad()
            loss = loss_of([dict(column) for column in features], None)
            loss.backward()
            return float(loss.detach())

        return run

    return model[0].auto_model, {name: _over(step(name), ready) for name in kinds}


def gradient_difference(ours: Any, theirs: Any) -> float:
    """Norm of the difference of two models' gradients, as a share of the norm of theirs."""
    import torch

    pairs = list(zip(ours.named_parameters(), theirs.named_parameters(), strict=True))
    if any(mine != other for (mine, _), (other, _) in pairs):
        raise ValueError("the two models have different parameters")
    grads = [(a.grad, b.grad) for (_, a), (_, b) in pairs if a.grad is not None or b.grad is not None]
    flat = [torch.cat([grad.flatten() for grad in side]) for side in zip(*grads, strict=True)]
    return float((flat[0] - flat[1]).norm() / flat[1].norm())


def compare(family: str, quick: bool) -> list[dict[str, Any]]:
    """Rows of the table for one backbone."""
    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = save_backbone(family, 4, 256, Path(name))
        words = words_of_one_token(tokenizer)
        batches = [batch_texts(words, 10 * seed) for seed in range(2 if quick else 3)]
        our_model, ours = our_steps(folder, family, batches)
        their_model, theirs = their_steps(folder, family, batches)
        rows = []
        for kind in TARGETS:
            losses = zip(ours[kind](), theirs[kind](), strict=True)
            loss_difference = max(abs(a - b) for a, b in losses)
            gradients = gradient_difference(our_model, their_model)
            times = alternate({"ours": ours[kind], "theirs": theirs[kind]}, 2 if quick else 5)
            ratio = times["theirs"].cpu_median / times["ours"].cpu_median
            rows.append(
                {
                    "backbone": f"{family} 4x256",
                    "step": kind,
                    "theirs cpu s": times["theirs"].cpu_median / len(batches),
                    "ours cpu s": times["ours"].cpu_median / len(batches),
                    "times faster": ratio,
                    "wall": times["theirs"].wall_median / times["ours"].wall_median,
                    "noise": max(timing.noise for timing in times.values()),
                    "target": TARGETS[kind],
                    "reached": ratio >= TARGETS[kind],
                    "loss differs": loss_difference,
                    "gradient differs": gradients,
                    "equal": loss_difference < TOLERANCE and gradients < 1e-4,
                }
            )
        return rows


def _rows(number: int, queries: list[str], positives: list[str], negatives: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "query": query,
            "passages": [positive, negative],
            "passage_ids": [f"{number}-p{row}", f"{number}-n{row}"],
            "positive_ids": [f"{number}-p{row}"],
            "own_group_only": False,
        }
        for row, (query, positive, negative) in enumerate(zip(queries, positives, negatives, strict=True))
    ]


def _over(step: Callable[[Any], float], batches: list[Any]) -> Callable[[], list[float]]:
    return lambda: [step(batch) for batch in batches]


def main() -> int:
    """Compare on both backbones; 1 where results differ."""
    settings = arguments(__doc__)
    announce(
        "Contrastive training step",
        ("torch", "transformers", "sentence-transformers"),
        settings.threads,
        f"{QUERIES} queries (5-15 tokens), a positive and a hard negative each (10-128 tokens, log-normal); "
        "forward + backward,\nsame weights, temperature and texts; seconds a step, median of alternating repetitions",
    )
    rows = [row for family in ("bert", "qwen3") for row in compare(family, settings.quick)]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
