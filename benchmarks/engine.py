"""Our rollout engine against ``model.generate``: ``python -m benchmarks.engine [--device cuda]``.

Both draw 8 responses a prompt at temperature 1 from the same random weights. Prompts have 8 to 120 tokens; one token in
24 ends a response, so that lengths are geometric, and none is longer than 96. ``generate`` runs as one would call it:
the dynamic cache, left padding, ``num_return_sequences=8``. It carries a copy of the prompt for each response and goes
on until the longest response is done; tokens behind a response's end do not count for either side.

On a CPU: the preset ``tiny-qwen3``, and two layers of the shape of Qwen2.5-0.5B, where the head is nearly all of the
cost, both in float32. On a GPU (``--device cuda``): the shapes of Qwen2.5-0.5B and 1.5B with all layers, in bfloat16,
with and without CUDA graphs of the decode steps. That path has not been run yet; greedy responses may part at near
ties there, so that only the log-probs decide.
"""

import argparse
import random
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.harness import alternate, announce, arguments, print_table

SAMPLES, LONGEST, GREEDY_TOKENS = 8, 96, 24
ENDS_ONE_IN = 24
CHECKED = 16  # responses whose log-probs are computed again
TARGET = 4.0  # on the tiny model
TOLERANCE = {"cpu": 1e-4, "cuda": 0.1}  # of log-probs, float32 and bfloat16


class Shape(NamedTuple):
    """Sizes of a Qwen2 with tied embeddings."""

    width: int
    heads: int
    inner: int
    layers: int


class Case(NamedTuple):
    """A model, numbers of prompts to try it with, and repetitions; the last two also for ``--quick``."""

    shape: Shape | None  # None: the preset
    prompts: tuple[int, ...]
    quick: tuple[int, ...]
    repetitions: int = 3


CASES = {
    "cpu": {
        "tiny-qwen3": Case(None, (8, 64), (8, 64), 5),
        "Qwen2 2x896": Case(Shape(896, 14, 4864, 2), (8, 64), (2,), 1),
    },
    "cuda": {
        "Qwen2 24x896": Case(Shape(896, 14, 4864, 24), (8, 64), (8,)),
        "Qwen2 28x1536": Case(Shape(1536, 12, 8960, 28), (8, 64), (8,)),
    },
}


def build(shape: Shape | None, device: str) -> Any:
    """A model with random weights that are larger than the usual start, so that predictions depend on the text."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    from lit_core.presets import preset_config

    config = preset_config("tiny-qwen3")
    if shape is not None:
        sizes = {"hidden_size": shape.width, "intermediate_size": shape.inner, "num_hidden_layers": shape.layers}
        heads = {"num_attention_heads": shape.heads, "num_key_value_heads": 2}
        config = Qwen2Config(vocab_size=151_936, tie_word_embeddings=True, **sizes, **heads)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype={"cpu": torch.float32, "cuda": torch.bfloat16}[device])
    for name, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in name:
            parameter.data.mul_(4)
    model.generation_config.pad_token_id = model.generation_config.eos_token_id = None
    return model.eval()


def padded(prompts: Sequence[Sequence[int]], device: str) -> dict[str, Any]:
    """Prompts as ``generate`` takes them, padded on the left."""
    import torch

    width = max(map(len, prompts))
    ids = [[0] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
        "pad_token_id": 0,
    }


def drawn_by_generate(model: Any, inputs: dict[str, Any], ends: Sequence[int]) -> int:
    """Number of tokens that ``generate`` draws, each response up to and including its end."""
    import torch

    found = model.generate(
        **inputs,
        do_sample=True,
        top_k=0,
        num_return_sequences=SAMPLES,
        max_new_tokens=LONGEST,
        eos_token_id=list(ends),
    )
    responses = found[:, inputs["input_ids"].shape[1] :]
    ended = torch.isin(responses, torch.tensor(ends, device=responses.device)).cumsum(1)
    return int(((ended == 0).sum(1) + 1).clamp(max=responses.shape[1]).sum())


def largest_difference(model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Any], device: str) -> float:
    """Of the engine's log-probs from those of a forward pass over prompt and response."""
    import torch

    largest = 0.0
    for prompt, completion in zip(prompts, completions, strict=True):
        count = len(completion.tokens)
        ids = torch.tensor([[*prompt, *completion.tokens]], device=device)
        with torch.inference_mode():
            logits = model(input_ids=ids, logits_to_keep=count + 1).logits[0, :-1]
        expected = logits.float().log_softmax(-1).gather(1, ids[0, -count:, None])[:, 0].cpu()
        largest = max(largest, float((expected - completion.log_probs).abs().max()))
    return largest


def compare(name: str, case: Case, prompt_count: int, device: str, repetitions: int) -> dict[str, Any]:
    """Row of the table for one model and number of prompts."""
    from lit_core.generation import SamplingParams, TorchEngine

    model = build(case.shape, device)
    engine, vocabulary = TorchEngine(model, graphs=True if device == "cuda" else None), model.config.vocab_size
    eager = TorchEngine(model, graphs=False)
    generator = random.Random(0)
    prompts = [generator.choices(range(vocabulary), k=generator.randint(8, 120)) for _ in range(prompt_count)]
    ends = generator.sample(range(vocabulary), vocabulary // ENDS_ONE_IN)
    params = SamplingParams(max_tokens=LONGEST, stop_ids=tuple(ends))
    inputs = padded(prompts, device)
    completions: list[list[Any]] = []
    without: list[list[Any]] = []
    theirs: list[int] = []
    variants: dict[str, Callable[[], object]] = {
        "ours": lambda: completions.append(engine.generate(prompts, params, SAMPLES, seeds=len(completions))),
        "generate": lambda: theirs.append(drawn_by_generate(model, inputs, ends)),
    }
    if device == "cuda":
        variants["no graphs"] = lambda: without.append(eager.generate(prompts, params, SAMPLES, seeds=len(without)))
    times = alternate(variants, repetitions, warm=device == "cuda" or case.shape is None)
    tokens = {
        "ours": sum(len(completion.tokens) for found in completions[-repetitions:] for completion in found),
        "generate": sum(theirs[-repetitions:]),
        "no graphs": sum(len(completion.tokens) for found in without[-repetitions:] for completion in found),
    }
    rates = {side: tokens[side] / sum(timing.cpu if device == "cpu" else timing.wall) for side, timing in times.items()}
    greedy = engine.generate(prompts, SamplingParams(temperature=0, max_tokens=GREEDY_TOKENS))
    expected = model.generate(**inputs, do_sample=False, max_new_tokens=GREEDY_TOKENS)[:, -GREEDY_TOKENS:].tolist()
    same = [one.tokens == other for one, other in zip(greedy, expected, strict=True)]
    owners = [prompt for prompt in prompts for _ in range(SAMPLES)]
    step = max(1, len(owners) // CHECKED)
    difference = largest_difference(model, owners[::step], completions[-1][::step], device)
    ratio = rates["ours"] / rates["generate"]
    return {
        "model": name,
        "responses": prompt_count * SAMPLES,
        "tokens": tokens["ours"] // repetitions,
        "ours tokens/s": round(rates["ours"]),
        **({"no graphs tokens/s": round(rates["no graphs"])} if device == "cuda" else {}),
        "generate tokens/s": round(rates["generate"]),
        "times faster": ratio,
        "target": TARGET if case.shape is None else "",
        "reached": case.shape is not None or ratio >= TARGET,
        "greedy equal": f"{sum(same)}/{len(same)}",
        "log-probs differ": difference,
        "equal": difference < TOLERANCE[device] and (device == "cuda" or all(same)),
    }


def main() -> int:
    """Compare on all models; 1 where results differ."""
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--device", choices=sorted(CASES), default="cpu")
    own, sys.argv[1:] = parser.parse_known_args()
    settings = arguments(__doc__)
    if own.device == "cuda":
        import torch

        if not torch.cuda.is_available():
            parser.error("--device cuda: there is no GPU that torch can use")
    announce(
        "Rollout engine",
        ("torch", "transformers"),
        settings.threads,
        f"{SAMPLES} responses a prompt, one token in {ENDS_ONE_IN} ends one, at most {LONGEST}; tokens a second of "
        f"{'CPU' if own.device == 'cpu' else 'wall'} time on {own.device}, all repetitions together",
    )
    rows = []
    for name, case in CASES[own.device].items():
        for count in case.quick if settings.quick else case.prompts:
            rows.append(compare(name, case, count, own.device, 1 if settings.quick else case.repetitions))
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
