"""The head of a policy in tiles: ``python -m benchmarks.lm_head``.

Log-probabilities of drawn tokens, alone or with an entropy, forward and backward pass from hidden states in float32:

- ``ours``: ``token_log_probs``, tiles of some rows by some words;
- ``row chunks``: the same code in chunks of the whole vocabulary with as many logits as a call may hold, as it was;
- ``full logits``: what one writes first, ``log_softmax`` of all of them; left out with 8,192 tokens at the large head,
  where it takes some 10 GiB.

The variants run in turn in one process. Peak memory is what a step adds to a process that holds states and weights; the
gradients are part of it. ``policy_update`` has the large head against TRL too, in fresh processes.
"""

import ctypes
import gc
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

from benchmarks.harness import Timing, announce, arguments, peak_memory, print_table
from benchmarks.harness import reset_peak_memory as reset

SPREAD = 6.0  # standard deviation of the logits: nuclei of tens of tokens
TERMS = ("log-probs", "entropy", "TRE-K 2", "TRE-P 0.99")
TOLERANCE = 1e-4


class Case(NamedTuple):
    """Sizes, and what is measured."""

    tokens: int
    vocabulary: int
    width: int
    repetitions: int
    variants: tuple[str, ...] = ("full logits", "row chunks", "ours")
    terms: tuple[str, ...] = TERMS


CASES = (
    Case(1_024, 4_096, 128, 15),
    Case(8_192, 4_096, 128, 5),
    Case(1_024, 151_936, 896, 2),
    Case(8_192, 151_936, 896, 1, ("row chunks", "ours"), ("log-probs",)),
)
QUICK_CASES = (Case(1_024, 4_096, 128, 7), Case(1_024, 37_984, 896, 2))  # a quarter of the vocabulary


class Inputs(NamedTuple):
    """States ``(N, D)``, head ``(V, D)``, targets ``(N,)``, and weights of log-probabilities and entropies ``(N,)``."""

    hidden: Any
    weight: Any
    targets: Any
    outer: Any
    bonus: Any


def inputs(case: Case) -> Inputs:
    """Always the same random numbers."""
    import torch

    torch.manual_seed(0)
    weight = torch.randn(case.vocabulary, case.width).mul_(SPREAD / case.width**0.5).requires_grad_()
    hidden = torch.randn(case.tokens, case.width).requires_grad_()
    targets = torch.randint(case.vocabulary, (case.tokens,))
    return Inputs(hidden, weight, targets, torch.randn(case.tokens), 0.1 * torch.rand(case.tokens))


def regions() -> dict[str, Any]:
    """Truncations by the term that has them."""
    from lit_core.lm_head import Truncation

    return {"TRE-K 2": Truncation(top_k=2), "TRE-P 0.99": Truncation(top_p=0.99)}


def our_terms(term: str, given: Inputs) -> tuple[Any, Any]:
    """Log-probability and entropy of each token; None without an entropy."""
    from lit_core.lm_head import token_log_probs

    found = token_log_probs(*given[:3], entropy=term == "entropy", truncation=regions().get(term))
    return found.log_probs, found.entropy if found.truncated_entropy is None else found.truncated_entropy


def whole_vocabulary(rows: int, vocabulary: int, most: int, best: int, cuda: bool) -> Any:
    """Tiles as they were: as many rows as the logits that a call may hold allow."""
    from lit_core.head_tiles import Tiles

    step = max(1, most // vocabulary)
    return Tiles([slice(start, min(start + step, rows)) for start in range(0, rows, step)], [slice(0, vocabulary)])


def terms_of_full_logits(term: str, given: Inputs) -> tuple[Any, Any]:
    """The same from all logits."""
    from lit_rl.functional.exploration import trust_region_entropy

    logits = given.hidden @ given.weight.T
    logs = logits.log_softmax(-1)
    log_probs = logs.gather(1, given.targets[:, None]).squeeze(1)
    if term == "entropy":
        return log_probs, -(logs.exp() * logs).sum(-1)
    region = regions().get(term)
    return log_probs, region and trust_region_entropy(logits, region.top_k, region.top_p, "none")


def step(variant: str, term: str, given: Inputs) -> None:
    """Forward and backward pass."""
    given.hidden.grad = given.weight.grad = None
    terms: Callable[[str, Inputs], tuple[Any, Any]] = terms_of_full_logits if variant == "full logits" else our_terms
    chunked = mock.patch("lit_core.lm_head.tiling", whole_vocabulary) if variant == "row chunks" else nullcontext()
    with chunked:  # the backward pass asks for the tiles too
        log_probs, entropy = terms(term, given)
        loss = (log_probs * given.outer).sum()
        if entropy is not None:
            loss = loss - (entropy * given.bonus).sum()
        loss.backward()


def compare(case: Case, term: str) -> list[dict[str, Any]]:
    """Rows of the table for one case and term."""
    given = inputs(case)
    timings = {variant: Timing() for variant in case.variants}
    memory: dict[str, float] = {}
    apart: dict[str, float] = {}
    expected: list[Any] = []
    for repetition in range(case.repetitions):
        for variant, timing in timings.items():
            given.hidden.grad = given.weight.grad = None
            gc.collect()
            ctypes.CDLL(None).malloc_trim(0)  # what an earlier step has freed would hide what this one takes
            before = reset()
            timing.add(partial(step, variant, term, given))
            memory[variant] = max(memory.get(variant, 0.0), peak_memory() - before)
            if repetition == 0:
                grads = [given.hidden.grad, given.weight.grad]
                expected = expected or [grad.clone() for grad in grads]
                pairs = zip(grads, expected, strict=True)
                apart[variant] = max(float((one - other).norm() / other.norm()) for one, other in pairs)
    ours = timings["ours"]
    return [
        {
            "tokens": case.tokens,
            "head": f"{case.vocabulary:,} x {case.width}",
            "term": term,
            "variant": variant,
            "cpu s": timing.cpu_median,
            "wall s": timing.wall_median,
            "ours times faster": timing.cpu_median / ours.cpu_median,
            "noise": timing.noise,
            "peak MiB": memory[variant],
            "ours share of peak": memory["ours"] / memory[variant],
            "gradients differ": apart[variant],
            "equal": apart[variant] < TOLERANCE,
        }
        for variant, timing in timings.items()
    ]


def main() -> int:
    """Compare the variants; 1 where gradients differ."""
    settings = arguments(__doc__)
    announce(
        "Head in tiles", ("torch",), settings.threads, "medians of CPU seconds, gradients against the first variant"
    )
    cases = QUICK_CASES if settings.quick else CASES
    rows = [row for case in cases for term in case.terms for row in compare(case, term)]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
