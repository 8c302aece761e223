"""One query-likelihood training step in four ways: ``python -m benchmarks.ql_step``.

- ``split``, our default: two causal attention calls a layer, chunked head at the rows that predict the query;
- ``dense``, our reference form: one sequence a pair, 4D mask, the same chunked head;
- ``query logits``: the whole batch padded together, 4D mask, plain logits and cross-entropy at the query's rows;
- ``full logits``, what one writes first: the same with logits at every position.

Forward and backward pass, in two cases: a vocabulary of 151,936, where the head is nearly all of the cost, and long
documents, where the mask is. Every measurement in a fresh process. Peak memory is what a step adds to the process with
the model built; the gradients (78 MB for the large embedding) are part of it.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Timing, announce, arguments, log_normal_lengths, peak_memory, print_table
from benchmarks.harness import reset_peak_memory as reset

LAYERS, WIDTH = 2, 128


class Case(NamedTuple):
    """What is measured: rows of the head, least, median and most tokens of a document."""

    vocabulary: int
    documents: tuple[int, int, int]


CASES = {"head": Case(151_936, (100, 140, 200)), "mask": Case(4_096, (500, 750, 1000))}
VARIANTS = ("split", "dense", "query logits", "full logits")
MEMORY_TARGET = 0.25
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def build(case: Case) -> Any:
    """A Qwen3 with tied embeddings, always with the same random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from lit_core.presets import preset_config

    torch.manual_seed(0)
    sizes = {
        "vocab_size": case.vocabulary,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 3 * WIDTH,
    }
    return AutoModelForCausalLM.from_config(preset_config("tiny-qwen3", **sizes))


def pairs(case: Case, count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random documents and queries of 5-32 tokens, of log-normal lengths."""
    generator = random.Random(0)
    least, median, most = case.documents
    documents = log_normal_lengths(count, median, 0.3, least, most, 0)
    queries = log_normal_lengths(count, 12, 0.5, 5, 32, 1)
    made = [
        [generator.choices(range(case.vocabulary), k=length) for length in lengths] for lengths in (documents, queries)
    ]
    return made[0], made[1]


def plain_loss(model: Any, documents: list[list[int]], queries: list[list[int]], everywhere: bool) -> Any:
    """The straightforward step: one padded batch, a 4D mask, the model's own head and PyTorch's cross-entropy."""
    import torch
    import torch.nn.functional as F

    from lit_embed.functional.masks import attention_stop

    rows = [document + query for document, query in zip(documents, queries, strict=True)]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    valid = torch.tensor([[True] * len(row) + [False] * (longest - len(row)) for row in rows])
    end = torch.tensor([len(document) - 1 for document in documents])
    is_query = valid & (torch.arange(longest) > end[:, None])
    labels = torch.where(is_query, ids, -100)[:, 1:].flatten()
    hidden = model.model(input_ids=ids, attention_mask=attention_stop(valid, end), use_cache=False).last_hidden_state
    states = hidden[:, :-1].flatten(0, 1)
    if not everywhere:
        states, labels = states[labels != -100], labels[labels != -100]
    return F.cross_entropy(model.lm_head(states).float(), labels)


def loss_of(variant: str, model: Any, documents: list[list[int]], queries: list[list[int]]) -> Callable[[], Any]:
    """The loss of one variant."""
    if variant.endswith("logits"):
        return lambda: plain_loss(model, documents, queries, everywhere=variant == "full logits")
    from lit_core.tokens import Tokens
    from lit_embed.modules.query_likelihood import QueryLikelihood

    likelihood = QueryLikelihood(model, pad_id=0, form=variant)  # type: ignore[arg-type]
    packed = Tokens.from_lists(documents), Tokens.from_lists(queries)
    return lambda: likelihood(*packed)


def measure(case: Case, variant: str, count: int, gradients: Path | None) -> dict[str, float]:
    """In this process: one step of a variant, its memory, then a second one for its time (the first also warms up)."""
    import torch

    model = build(case).train()
    loss = loss_of(variant, model, *pairs(case, count))
    before = reset()
    value = loss()
    value.backward()
    memory = peak_memory() - before
    if gradients is not None:
        torch.save({name: parameter.grad for name, parameter in model.named_parameters()}, gradients)
    timing = Timing()
    model.zero_grad()
    timing.add(lambda: loss().backward())
    return {"loss": float(value.detach()), "memory": memory, "cpu": timing.cpu[0], "wall": timing.wall[0]}


def in_a_fresh_process(case: str, variant: str, count: int, threads: int, gradients: Path | None) -> dict[str, float]:
    """Call :func:`measure` in a child process."""
    code = (
        "import json, sys, pathlib; sys.argv = ['ql_step', '--threads', sys.argv[1], *sys.argv[2:]];"
        "from benchmarks.harness import arguments; from benchmarks import ql_step; rest = sys.argv[3:]; "
        "sys.argv = sys.argv[:3]; arguments(''); "
        "print(json.dumps(ql_step.measure(ql_step.CASES[rest[0]], rest[1], int(rest[2]), "
        "pathlib.Path(rest[3]) if rest[3] else None)))"
    )
    command = [sys.executable, "-c", code, str(threads), case, variant, str(count), str(gradients or "")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process of variant {variant} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def gradient_difference(path: Path, reference: Path) -> float:
    """Norm of the difference of two saved sets of gradients, as a share of the reference's norm."""
    import torch

    ours, theirs = torch.load(path), torch.load(reference)
    if ours.keys() != theirs.keys():
        raise ValueError("the variants have different parameters")
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    difference, norm = (sum(float(pair[side]) for pair in squares) for side in (0, 1))
    return (difference / norm) ** 0.5


def compare(case: str, count: int, repetitions: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table for one case and batch size."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        files = {variant: Path(name) / f"{variant}.pt" for variant in VARIANTS}
        for repetition in range(repetitions):
            for variant in VARIANTS:
                saved = files[variant] if repetition == 0 else None
                found[variant].append(in_a_fresh_process(case, variant, count, threads, saved))
        differences = {variant: gradient_difference(files[variant], files[VARIANTS[-1]]) for variant in VARIANTS}

    def median(variant: str, key: str) -> float:
        return statistics.median(values[key] for values in found[variant])

    rows = []
    for variant in VARIANTS:
        loss_difference = abs(found[variant][0]["loss"] - found[VARIANTS[-1]][0]["loss"])
        share = median(variant, "memory") / median(VARIANTS[-1], "memory")
        faster = median(VARIANTS[-1], "cpu") / median(variant, "cpu")
        rows.append(
            {
                "case": case,
                "pairs": count,
                "variant": variant,
                "cpu s": median(variant, "cpu"),
                "wall s": median(variant, "wall"),
                "times faster": faster,
                "peak MiB": median(variant, "memory"),
                "share of peak": share,
                "reached": variant != "split" or case != "head" or (share < MEMORY_TARGET and faster > 1),
                "loss differs": loss_difference,
                "gradient differs": differences[variant],
                "equal": loss_difference < LOSS_TOLERANCE and differences[variant] < GRADIENT_TOLERANCE,
            }
        )
    return rows


def describe() -> str:
    """The cases in words."""
    return ", ".join(
        f"{name}: vocabulary {case.vocabulary:,} and documents of {case.documents[0]}-{case.documents[2]} tokens"
        for name, case in CASES.items()
    )


def main() -> int:
    """Compare the variants; 1 where loss or gradients differ."""
    settings = arguments(__doc__)
    announce(
        "Query-likelihood training step",
        ("torch", "transformers"),
        settings.threads,
        f"Qwen3 {LAYERS}x{WIDTH}; {describe()}; queries of 5-32 tokens; medians over fresh processes",
    )
    count, repetitions = (8, 1) if settings.quick else (16, 3)
    rows = [row for case in CASES for row in compare(case, count, repetitions, settings.threads)]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
