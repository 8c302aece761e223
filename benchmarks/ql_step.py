"""One query-likelihood training step in four ways: ``python -m benchmarks.ql_step``.

- ``split``, our default: two causal attention calls a layer, chunked head at the rows that predict the query;
- ``dense``, our reference form: one sequence a pair, 4D mask, the same chunked head;
- ``query logits``: the whole batch padded together, 4D mask, plain logits and cross-entropy at the query's rows;
- ``full logits``, what one writes first: the same with logits at every position.

Forward and backward pass at a vocabulary of 151,936; every measurement in a fresh process. Peak memory is what the step
adds to the process with the model built; the gradients (78 MB for the embedding) are part of it.
"""

import json
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import Timing, announce, arguments, log_normal_lengths, peak_memory, print_table
from benchmarks.harness import reset_peak_memory as reset

VOCABULARY, LAYERS, WIDTH = 151_936, 2, 128
VARIANTS = ("split", "dense", "query logits", "full logits")
MEMORY_TARGET = 0.25
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def build() -> Any:
    """A Qwen3 with a large vocabulary and tied embeddings, always with the same random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from lit_core.presets import preset_config

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 3 * WIDTH,
    }
    return AutoModelForCausalLM.from_config(preset_config("tiny-qwen3", **sizes))


def pairs(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Random documents of 100-200 tokens (log-normal) and queries of 5-32 tokens."""
    generator = random.Random(0)
    documents = log_normal_lengths(count, 140, 0.3, 100, 200, 0)
    queries = log_normal_lengths(count, 12, 0.5, 5, 32, 1)
    made = [[generator.choices(range(VOCABULARY), k=length) for length in lengths] for lengths in (documents, queries)]
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
    from lit_embed.modules.query_likelihood import QueryLikelihood
    from lit_embed.modules.tokens import Tokens

    likelihood = QueryLikelihood(model, pad_id=0, form=variant)  # type: ignore[arg-type]
    packed = Tokens.from_lists(documents), Tokens.from_lists(queries)
    return lambda: likelihood(*packed)


def measure(variant: str, count: int, gradients: Path | None) -> dict[str, float]:
    """In this process: one step of a variant, its memory, then a second one for its time (the first also warms up)."""
    import torch

    model = build().train()
    loss = loss_of(variant, model, *pairs(count))
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


def in_a_fresh_process(variant: str, count: int, threads: int, gradients: Path | None) -> dict[str, float]:
    """Call :func:`measure` in a child process."""
    code = (
        "import json, sys, pathlib; sys.argv = ['ql_step', '--threads', sys.argv[1], *sys.argv[2:]];"
        "from benchmarks.harness import arguments; from benchmarks import ql_step; rest = sys.argv[3:]; "
        "sys.argv = sys.argv[:3]; arguments(''); "
        "print(json.dumps(ql_step.measure(rest[0], int(rest[1]), pathlib.Path(rest[2]) if rest[2] else None)))"
    )
    command = [sys.executable, "-c", code, str(threads), variant, str(count), str(gradients or "")]
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


def compare(count: int, repetitions: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table for one batch size."""
    found: dict[str, list[dict[str, float]]] = {variant: [] for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as name:
        files = {variant: Path(name) / f"{variant}.pt" for variant in VARIANTS}
        for repetition in range(repetitions):
            for variant in VARIANTS:
                saved = files[variant] if repetition == 0 else None
                found[variant].append(in_a_fresh_process(variant, count, threads, saved))
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
                "pairs": count,
                "variant": variant,
                "cpu s": median(variant, "cpu"),
                "wall s": median(variant, "wall"),
                "times faster": faster,
                "peak MiB": median(variant, "memory"),
                "share of peak": share,
                "reached": variant != "split" or (share < MEMORY_TARGET and faster > 1),
                "loss differs": loss_difference,
                "gradient differs": differences[variant],
                "equal": loss_difference < LOSS_TOLERANCE and differences[variant] < GRADIENT_TOLERANCE,
            }
        )
    return rows


def main() -> int:
    """Compare the variants; 1 where loss or gradients differ."""
    settings = arguments(__doc__)
    announce(
        "Query-likelihood training step",
        ("torch", "transformers"),
        settings.threads,
        f"Qwen3 {LAYERS}x{WIDTH}, vocabulary {VOCABULARY:,}, documents 100-200 tokens, queries 5-32; "
        "forward + backward; medians over fresh processes",
    )
    sizes, repetitions = ((8,), 1) if settings.quick else ((16,), 3)
    rows = [row for count in sizes for row in compare(count, repetitions, settings.threads)]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
