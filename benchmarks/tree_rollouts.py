"""Trees of responses against ``model.generate`` on the prefixes: ``python -m benchmarks.tree_rollouts``.

Both draw the same trees: eight responses a prompt, one after the other, half of them from a random position of an
earlier one, each of a length that is given (geometric, at most 96), so that the work is the same whatever is drawn.
``generate`` runs as one would call it for a round: prompts and prefixes of all trees side by side, padded on the left,
read anew in each round, and the whole batch goes on until the longest response of the round is done. At temperature 0
both have to draw the same tokens. Our engine is also timed with prefixes that are read again (``reuse=False``).
"""

import random
import sys
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.engine import CASES, Case, build
from benchmarks.harness import alternate, announce, arguments, print_table

RESPONSES, LONGEST, EPSILON = 8, 96, 0.5
ENDS_ONE_IN = 24
TARGET = 3.0


class Plan:
    """The same trees for both sides: parents, positions and lengths are decided beforehand."""

    responses, width = RESPONSES, 1

    def __init__(self, prompts: int, seed: int) -> None:
        generator = random.Random(seed)
        self.trees: list[list[tuple[int | None, int, int]]] = []
        for _ in range(prompts):
            tree: list[tuple[int | None, int, int]] = []
            for number in range(RESPONSES):
                length = 1
                while length < LONGEST and generator.random() > 1 / ENDS_ONE_IN:
                    length += 1
                parent = generator.randrange(number) if number and generator.random() > EPSILON else None
                position = 0 if parent is None else generator.randrange(tree[parent][2])
                tree.append((parent, position, min(LONGEST, position + length)))
            self.trees.append(tree)

    @property
    def tokens(self) -> int:
        """New tokens of all trees."""
        return sum(length - position for tree in self.trees for _, position, length in tree)

    def __call__(self, prompt: int, responses: Sequence[Any]) -> list[Any]:
        from lit_core.generation import Branch

        if len(responses) == RESPONSES:
            return []
        parent, position, length = self.trees[prompt][len(responses)]
        return [Branch(0, parent, position, length)]


def by_generate(model: Any, prompts: Sequence[Sequence[int]], plan: Plan) -> list[list[list[int]]]:
    """The trees, a round at a time."""
    import torch

    trees: list[list[list[int]]] = [[] for _ in prompts]
    for number in range(RESPONSES):
        texts, prefixes, counts = [], [], []
        for prompt, tree, planned in zip(prompts, trees, plan.trees, strict=True):
            parent, position, length = planned[number]
            prefixes.append([] if parent is None else tree[parent][:position])
            texts.append([*prompt, *prefixes[-1]])
            counts.append(length - position)
        width = max(map(len, texts))
        found = model.generate(
            input_ids=torch.tensor([[0] * (width - len(text)) + text for text in texts]),
            attention_mask=torch.tensor([[0] * (width - len(text)) + [1] * len(text) for text in texts]),
            do_sample=False,
            max_new_tokens=max(counts),
            pad_token_id=0,
        )[:, width:].tolist()
        for tree, prefix, row, count in zip(trees, prefixes, found, counts, strict=True):
            tree.append([*prefix, *row[:count]])
    return trees


def compare(name: str, case: Case, count: int, repetitions: int) -> dict[str, Any]:
    """Row of the table for one model and number of prompts."""
    from lit_core.generation import SamplingParams, TorchEngine

    model = build(case.shape, "cpu")
    generator = random.Random(0)
    vocabulary = model.config.vocab_size
    prompts = [generator.choices(range(vocabulary), k=generator.randint(8, 120)) for _ in range(count)]
    plan, engine = Plan(count, 1), TorchEngine(model)
    params = SamplingParams(temperature=0, max_tokens=LONGEST)
    found: dict[str, Any] = {}

    def grown(reuse: bool) -> list[list[list[int]]]:
        trees = engine.grow(prompts, plan, params, reuse=reuse)
        return [[response.tokens for response in tree] for tree in trees]

    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: found.update(ours=grown(True)),
        "read again": lambda: found.update(again=grown(False)),
        "generate": lambda: found.update(generate=by_generate(model, prompts, plan)),
    }
    times = alternate(variants, repetitions, warm=case.shape is None)
    seconds = {side: timing.cpu_median for side, timing in times.items()}
    ratio = seconds["generate"] / seconds["ours"]
    return {
        "model": name,
        "prompts": count,
        "new tokens": plan.tokens,
        "ours s": seconds["ours"],
        "read again s": seconds["read again"],
        "generate s": seconds["generate"],
        "times faster": ratio,
        "target": TARGET,
        "reached": ratio >= TARGET,
        "equal": found["ours"] == found["again"] == found["generate"],
    }


def main() -> int:
    """Compare on all models; 1 where results differ."""
    settings = arguments(__doc__)
    announce(
        "Trees of responses",
        ("torch", "transformers"),
        settings.threads,
        f"{RESPONSES} responses a prompt, half of them branches, at most {LONGEST} tokens; CPU seconds",
    )
    rows = []
    for name, case in CASES["cpu"].items():
        for count in case.quick if settings.quick else case.prompts:
            rows.append(compare(name, case, count, 1 if settings.quick else case.repetitions))
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
