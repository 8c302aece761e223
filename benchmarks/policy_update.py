"""The policy's update, its two halves: ``python -m benchmarks.policy_update``.

The head at a vocabulary of 151,936: log-probabilities of drawn tokens, alone or with an entropy that is to be raised
(over the whole vocabulary, or TRE over a trust region), forward and backward pass from hidden states in float32.

- ``ours``: ``token_log_probs``, which never holds more than a chunk of the logits;
- ``full logits``: what one writes first, ``log_softmax`` of all of them;
- ``TRL on logits``: its ``selective_log_softmax`` and ``entropy_from_logits``, which need them too;
- ``TRL's fused head``: what its trainers use, tiles of 4,096 tokens and 32,768 words.

Every measurement in a fresh process. Peak memory is what a step adds to a process that holds states and weights; the
weights' gradient is part of it. Then ours with 8 times the tokens.

The layout: forward and backward pass of PPO, policy and critic, over the same responses in one padded batch, in
length-sorted chunks, and behind prompts that a group shares.
"""

import argparse
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.harness import Timing, alternate, announce, arguments, peak_memory, print_table
from benchmarks.harness import reset_peak_memory as reset

VOCABULARY, ROWS = 151_936, 8
TOKENS, MANY_TOKENS = 1_024, 8_192  # of all rows together
WIDTH, QUICK_WIDTH = 896, 128  # that of Qwen2.5-0.5B
SPREAD = 6.0  # standard deviation of the logits: nuclei of tens of tokens
TERMS = ("log-probs", "entropy", "TRE-K 2", "TRE-P 0.99")
PEERS = {"log-probs": ("full logits", "TRL on logits", "TRL's fused head"), "TRE-K 2": ("full logits",)}
PEERS |= {"entropy": PEERS["log-probs"], "TRE-P 0.99": PEERS["TRE-K 2"]}
TOLERANCE = 1e-4
MEMORY_TARGET = 4096.0  # MiB of the whole process, with many tokens
GROWTH_TARGET = 0.05  # memory for the further tokens, as a share of their logits; states and gradients are 0.012

SAMPLES, LONGEST, ENDS_ONE_IN = 8, 96, 24
PROMPTS = {"8-120": (8, 120), "200-400": (200, 400)}
BUDGETS = {"one padded batch": ("sorted", 1 << 30), "length-sorted": ("sorted", 2048), "shared": ("shared", 2048)}


class Inputs(NamedTuple):
    """States ``(N, D)``, head ``(V, D)``, targets ``(N,)``, and weights of log-probabilities and entropies ``(N,)``."""

    hidden: Any
    weight: Any
    targets: Any
    outer: Any
    bonus: Any


def head_inputs(tokens: int, width: int) -> Inputs:
    """Always the same random numbers."""
    import torch

    torch.manual_seed(0)
    weight = torch.randn(VOCABULARY, width).mul_(SPREAD / width**0.5).requires_grad_()
    hidden = torch.randn(tokens, width).requires_grad_()
    targets = torch.randint(VOCABULARY, (tokens,))
    return Inputs(hidden, weight, targets, torch.randn(tokens), 0.1 * torch.rand(tokens))


def truncation_of(term: str) -> Any:
    """The trust region of a term, None without one."""
    from lit_core.lm_head import Truncation

    return {"TRE-K 2": Truncation(top_k=2), "TRE-P 0.99": Truncation(top_p=0.99)}.get(term)


def our_terms(term: str, given: Inputs) -> tuple[Any, Any]:
    """Log-probability and entropy of each token; None without an entropy."""
    from lit_core.lm_head import token_log_probs
    from lit_rl.functional.exploration import scaled

    found = token_log_probs(*given[:3], entropy=term == "entropy", truncation=truncation_of(term))
    if found.truncated_entropy is None or found.kept is None:
        return found.log_probs, found.entropy
    return found.log_probs, scaled(found.truncated_entropy, found.kept, VOCABULARY, "logV_over_logS")


def terms_of_full_logits(term: str, given: Inputs) -> tuple[Any, Any]:
    """The same from all logits."""
    from lit_rl.functional.exploration import trust_region_entropy

    logits = given.hidden @ given.weight.T
    logs = logits.log_softmax(-1)
    log_probs = logs.gather(1, given.targets[:, None]).squeeze(1)
    if term == "entropy":
        return log_probs, -(logs.exp() * logs).sum(-1)
    region = truncation_of(term)
    return log_probs, region and trust_region_entropy(logits, region.top_k, region.top_p)


def terms_of_trl(term: str, given: Inputs) -> tuple[Any, Any]:
    """The same by TRL's functions, a batch of rows as its trainers have."""
    from trl.trainer.utils import entropy_from_logits, selective_log_softmax

    logits = (given.hidden @ given.weight.T).view(ROWS, -1, VOCABULARY)
    log_probs = selective_log_softmax(logits, given.targets.view(ROWS, -1)).flatten()
    return log_probs, entropy_from_logits(logits).flatten() if term == "entropy" else None


def terms_of_trls_head(term: str, given: Inputs) -> tuple[Any, Any]:
    """The same by the function behind ``add_fused_lm_head``."""
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as WORDS

    wanted = ("log_probs", "entropy") if term == "entropy" else ("log_probs",)
    apply: Any = ChunkedLogProbFunction.apply
    return apply(given.hidden, given.weight, None, given.targets, 1.0, WORDS, None, 1.0, wanted)[:2]


VARIANTS: dict[str, Callable[[str, Inputs], tuple[Any, Any]]] = {
    "ours": our_terms,
    "full logits": terms_of_full_logits,
    "TRL on logits": terms_of_trl,
    "TRL's fused head": terms_of_trls_head,
}


def measure(term: str, variant: str, tokens: int, width: int, gradients: str) -> dict[str, float]:
    """In this process: a step, its memory, and the time of a second one (of the first with many tokens)."""
    import torch

    given = head_inputs(tokens, width)
    terms = VARIANTS[variant]
    _ = terms(term, Inputs(given.hidden[:ROWS], given.weight, given.targets[:ROWS], given.outer, given.bonus))

    def step() -> None:
        given.hidden.grad = given.weight.grad = None
        log_probs, entropy = terms(term, given)
        loss = (log_probs * given.outer).sum()
        if entropy is not None:
            loss = loss - (entropy * given.bonus).sum()
        loss.backward()

    timing = Timing()
    before = reset()
    timing.add(step)
    peak = peak_memory()
    if gradients:
        probes = torch.randn(width, 8, generator=torch.Generator().manual_seed(1))
        torch.save({"states": given.hidden.grad, "weights": given.weight.grad @ probes}, gradients)
    if tokens < MANY_TOKENS:
        timing.add(step)
    return {"cpu": timing.cpu[-1], "wall": timing.wall[-1], "memory": peak - before, "peak": peak}


def in_a_fresh_process(job: Sequence[Any], threads: int) -> dict[str, float]:
    """Call :func:`measure` in a child process."""
    command = [sys.executable, "-m", "benchmarks.policy_update", "--threads", str(threads), "--job", json.dumps(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"the process of {job} ended with {done.returncode}:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def difference(path: Path, reference: Path) -> float:
    """Norm of the difference of two saved sets of gradients as a share of the reference's, the largest of the set."""
    import torch

    ours, theirs = torch.load(path), torch.load(reference)
    return max(float((ours[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs)


def compare_heads(term: str, width: int, repetitions: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the table for one term."""
    names = ("ours", *PEERS[term])
    found: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / str(number) for number, name in enumerate(names)}
        for repetition in range(repetitions):
            for name in names:
                job = (term, name, TOKENS, width, "" if repetition else str(files[name]))
                found[name].append(in_a_fresh_process(job, threads))
        differences = {name: difference(files["ours"], files[name]) for name in names}
    medians = {
        name: {key: statistics.median(values[key] for values in found[name]) for key in found[name][0]}
        for name in names
    }
    return [
        {
            "term": term,
            "variant": name,
            "cpu s": medians[name]["cpu"],
            "wall s": medians[name]["wall"],
            "ours times faster": medians[name]["cpu"] / medians["ours"]["cpu"],
            "peak MiB": round(medians[name]["memory"]),
            "ours share of peak": medians["ours"]["memory"] / medians[name]["memory"],
            "gradients differ": differences[name],
            "equal": differences[name] < TOLERANCE,
        }
        for name in names
    ]


def many_tokens(term: str, width: int, few: float, threads: int) -> dict[str, Any]:
    """Ours with many tokens; ``few`` are the MiB that it adds with :data:`TOKENS`."""
    found = in_a_fresh_process((term, "ours", MANY_TOKENS, width, ""), threads)
    growth, float_mib = found["memory"] - few, 4 * (MANY_TOKENS - TOKENS) / 2**20
    return {
        "term": term,
        "tokens": MANY_TOKENS,
        "cpu s": found["cpu"],
        "wall s": found["wall"],
        "whole process MiB": round(found["peak"]),
        "peak MiB": round(found["memory"]),
        f"above {TOKENS} tokens": round(growth),
        "their states and gradients": round(2 * width * float_mib),
        "their logits": round(VOCABULARY * float_mib),
        "reached": found["peak"] < MEMORY_TARGET and growth < GROWTH_TARGET * VOCABULARY * float_mib,
    }


def random_sequences(prompts: int, least: int, most: int, vocabulary: int) -> Any:
    """Prompts of uniform length, each with :data:`SAMPLES` responses of geometric length."""
    from lit_rl.modules.layout import Sequences

    generator, words = random.Random(0), range(vocabulary)
    texts = [generator.choices(words, k=generator.randint(least, most)) for _ in range(prompts)]
    groups = [group for group in range(prompts) for _ in range(SAMPLES)]
    lengths = [min(LONGEST, 1 + int(generator.expovariate(-math.log(1 - 1 / ENDS_ONE_IN)))) for _ in groups]
    responses = [generator.choices(words, k=length) for length in lengths]
    return Sequences([texts[group] for group in groups], responses, groups)


def attached(module: Any) -> Any:
    """A method with its weights, attached to a trainer, which it asks for the step."""
    import logging

    from lightning.pytorch import Trainer

    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    module.configure_model()
    module.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=True)
    return module.train()


def gradients_of(module: Any, experience: Any, layout: str, budget: int) -> tuple[float, int]:
    """One update of a method without the optimizer's step: its loss, and the tokens that were read."""
    import torch

    from lit_rl.modules.experience import Totals

    module.zero_grad()
    rows = list(range(len(experience.mask)))
    chunks = experience.sequences.chunks(rows, budget, torch.device("cpu"), layout)
    scale = module.surrogate.denominators(experience, rows, chunks, None, module.update_constant(rows))
    total = 0.0
    for chunk in chunks:
        loss = module.chunk_loss(chunk, experience, scale, None, Totals(module.device), 0)
        loss.backward()
        total += float(loss.detach())
    return total, sum(chunk.tokens for chunk in chunks)


def flat_gradient(module: Any) -> Any:
    """All gradients of a module, one after the other."""
    import torch

    return torch.cat([parameter.grad.flatten() for parameter in module.parameters() if parameter.grad is not None])


def compare_layouts(name: str, prompts: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table for one range of prompts."""
    import torch

    from lit_rl.methods.ppo import PPO
    from lit_rl.modules.experience import Experience

    module = attached(PPO("nano-qwen3"))
    sequences = random_sequences(prompts, *PROMPTS[name], 1000)
    lengths = torch.tensor([len(response) for response in sequences.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    responses = torch.zeros(mask.shape, dtype=torch.long)
    responses[mask] = torch.tensor([token for response in sequences.responses for token in response])
    torch.manual_seed(0)
    old, advantages, values, noise = (torch.where(mask, torch.randn(mask.shape), 0.0) for _ in range(4))
    experience = Experience(sequences, responses, mask, old / 2 - 6.9, advantages, values + noise, values)
    reads: dict[str, int] = {}
    gradients: dict[str, Any] = {}
    steps = {layout: partial(gradients_of, module, experience, *choice) for layout, choice in BUDGETS.items()}
    for layout, step in steps.items():
        _, reads[layout] = step()
        gradients[layout] = flat_gradient(module)
    times = alternate(steps, repetitions, warm=False)
    expected, first = gradients["one padded batch"], times["one padded batch"]
    rows = []
    for layout, timing in times.items():
        apart = float((gradients[layout] - expected).norm() / expected.norm())
        rows.append(
            {
                "prompts": name,
                "responses": len(mask),
                "layout": layout,
                "tokens read": reads[layout],
                "cpu s": timing.cpu_median,
                "wall s": timing.wall_median,
                "times faster": first.cpu_median / timing.cpu_median,
                "noise": timing.noise,
                "gradient differs": apart,
                "equal": apart < TOLERANCE,
            }
        )
    return rows


def main() -> int:
    """Compare heads and layouts; 1 where gradients differ."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    own, sys.argv[1:] = parser.parse_known_args()
    settings = arguments(__doc__)
    if own.job:
        print(json.dumps(measure(*own.job)))
        return 0
    width, repetitions = (QUICK_WIDTH, 1) if settings.quick else (WIDTH, 2)
    announce(
        "Policy update",
        ("torch", "transformers", "trl"),
        settings.threads,
        f"head of {VOCABULARY:,} x {width}, {TOKENS:,} tokens, medians over processes; then PPO of nano-qwen3, "
        f"{SAMPLES} responses a prompt",
    )
    rows = [row for term in TERMS for row in compare_heads(term, width, repetitions, settings.threads)]
    print_table(rows)
    print()
    few = {row["term"]: row["peak MiB"] for row in rows if row["variant"] == "ours"}
    print_table([many_tokens(term, width, few[term], settings.threads) for term in TERMS])
    print()
    prompts, repeats = (8, 3) if settings.quick else (16, 7)
    layouts = [row for name in PROMPTS for row in compare_layouts(name, prompts, repeats)]
    print_table(layouts)
    return 0 if all(row["equal"] for row in rows + layouts) else 1


if __name__ == "__main__":
    sys.exit(main())
