"""The policy's update from responses that branched from one another: ``python -m benchmarks.trie_update``.

Forward and backward pass of GRPO with a different advantage at every token, a group of 8 responses for each prompt of
20 to 60 tokens: four drawn from the prompt, then four that each take over a random part of an earlier one and go on by
themselves. The same responses in length-sorted chunks (each read whole), behind a prompt that their group shares, and
as the trie of their tokens. ``auto`` is the layout that the method takes by itself.
"""

import random
import sys
from functools import partial
from typing import Any

from benchmarks.harness import alternate, announce, arguments, print_table
from benchmarks.policy_update import attached, flat_gradient, gradients_of

SAMPLES, FRESH = 8, 4  # responses of a prompt, and how many of them start at the prompt
PROMPT = (20, 60)
RESPONSES = {"48-64": (48, 64), "256-512": (256, 512)}
PROMPTS = {"48-64": (16, 4), "256-512": (4, 1)}  # groups, and groups of a quick run
MODELS = ("tiny-qwen3", "nano-qwen3")
LAYOUTS = ("sorted", "shared", "trie", "auto")
MICRO_TOKENS = 2048
TOLERANCE = 1e-5


def forest(prompts: int, least: int, most: int, vocabulary: int) -> Any:
    """Prompts with the responses of a tree each."""
    from lit_rl.modules.layout import Sequences

    generator, words = random.Random(0), range(vocabulary)
    texts, responses, groups = [], list[list[int]](), []
    for group in range(prompts):
        prompt, drawn = generator.choices(words, k=generator.randint(*PROMPT)), list[list[int]]()
        for number in range(SAMPLES):
            length, taken = generator.randint(least, most), list[int]()
            if number >= FRESH:
                parent = generator.choice(drawn)
                taken = parent[: generator.randrange(1, min(len(parent), length))]
            drawn.append(taken + generator.choices(words, k=length - len(taken)))
        texts += [prompt] * SAMPLES
        responses += drawn
        groups += [group] * SAMPLES
    return Sequences(texts, responses, groups)


def experience_of(sequences: Any) -> Any:
    """Random log-probabilities of the old policy and advantages, both by token of each response."""
    import torch

    from lit_rl.modules.experience import Experience

    lengths = torch.tensor([len(response) for response in sequences.responses])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    responses = torch.zeros(mask.shape, dtype=torch.long)
    responses[mask] = torch.tensor([token for response in sequences.responses for token in response])
    torch.manual_seed(0)
    old, advantages = (torch.where(mask, torch.randn(mask.shape), 0.0) for _ in range(2))
    return Experience(sequences, responses, mask, old / 2 - 6.9, advantages)


def compare(name: str, model: str, prompts: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table for one model and one range of lengths."""
    from lit_core.backbones import unwrap
    from lit_rl.methods.grpo import GRPO

    module = attached(GRPO(model))
    vocabulary = int(unwrap(module.policy.model).config.vocab_size)
    experience = experience_of(forest(prompts, *RESPONSES[name], vocabulary))
    steps = {layout: partial(gradients_of, module, experience, layout, MICRO_TOKENS) for layout in LAYOUTS}
    losses, reads, gradients = {}, {}, {}
    for layout, step in steps.items():
        losses[layout], reads[layout] = step()
        gradients[layout] = flat_gradient(module)
    times = alternate(steps, repetitions, warm=False)
    rows = []
    for layout, timing in times.items():
        apart = float((gradients[layout] - gradients["sorted"]).norm() / gradients["sorted"].norm())
        loss = abs(losses[layout] - losses["sorted"])
        rows.append(
            {
                "model": model,
                "responses": f"{len(experience.mask)} of {name}",
                "layout": layout,
                "tokens read": reads[layout],
                "cpu s": timing.cpu_median,
                "wall s": timing.wall_median,
                "times faster": times["sorted"].cpu_median / timing.cpu_median,
                "noise": timing.noise,
                "loss differs": loss,
                "gradient differs": apart,
                "equal": max(apart, loss) < TOLERANCE,
            }
        )
    return rows


def main() -> int:
    """Compare layouts; 1 where losses or gradients differ."""
    settings = arguments(__doc__)
    repetitions = 3 if settings.quick else 5
    announce(
        "Policy update from trees of responses",
        ("torch", "transformers"),
        settings.threads,
        f"groups of {SAMPLES} responses, half of them branched from earlier ones; medians of {repetitions}",
    )
    prompts = {name: counts[settings.quick] for name, counts in PROMPTS.items()}
    rows = [row for name in RESPONSES for model in MODELS for row in compare(name, model, prompts[name], repetitions)]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
