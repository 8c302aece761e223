"""What gradient surgery costs: ``python -m benchmarks.surgery``.

A language model of the shape of Qwen2.5-0.5B with two layers, three domains. First whole gradients: one or more
backward passes a domain into the same ``p.grad``, as mixed training does it, against the same passes into a gradient a
domain with the Gram matrices, the weights and the combined gradient, by parameter and coarser. What surgery costs does
not depend on the tokens of a step, so its share falls with them; the paper's steps have 512 responses of up to 4,096.
Then surgery alone, from gradients that are there, against the projection as it is written down, with a clone of every
gradient and a projection for every pair, parameter by parameter. Orders are the same, so that gradients must be.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

from benchmarks.harness import alternate, announce, arguments, peak_memory, print_table, reset_peak_memory

DOMAINS = ("chat", "if", "math")
SIZES = {  # of Qwen2.5-0.5B
    "hidden_size": 896, "intermediate_size": 4864, "num_attention_heads": 14, "num_key_value_heads": 2,
    "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
LAYERS, QUICK_VOCABULARY = 2, 32_000
TOKENS = (4, 128)  # rows and tokens of a domain's micro-batch
HEADS = 16  # tokens of a row that the head reads
PASSES = {1: ("param", "block", "global"), 8: ("param",)}  # micro-batches of a domain and step, and what is measured
TARGET = 3.0  # times faster than the projection with clones
SHARE = 0.03  # most of a step's time that surgery should take
TOLERANCE = 1e-5


def language_model(quick: bool) -> Any:
    """The model, with random weights."""
    import torch
    from transformers import AutoModelForCausalLM, Qwen2Config

    torch.manual_seed(0)
    sizes = {**SIZES, "num_hidden_layers": LAYERS, **({"vocab_size": QUICK_VOCABULARY} if quick else {})}
    return AutoModelForCausalLM.from_config(Qwen2Config(**sizes)).train()


def losses_of(model: Any) -> dict[str, Callable[[], Any]]:
    """A loss for each domain: states drawn to different places, and the head on a few tokens."""
    import torch

    generator = torch.Generator().manual_seed(1)
    vocabulary = model.config.vocab_size
    ids = {name: torch.randint(vocabulary, TOKENS, generator=generator) for name in DOMAINS}

    def loss(name: str) -> Any:
        states = model.model(input_ids=ids[name]).last_hidden_state[:, -HEADS:].flatten(0, 1)
        return torch.nn.functional.cross_entropy(model.lm_head(states), ids[name][:, :HEADS].flatten())

    return {name: partial(loss, name) for name in DOMAINS}


def plain(model: Any, losses: dict[str, Callable[[], Any]], passes: int) -> None:
    """The mixed gradient."""
    model.zero_grad()
    for loss in losses.values():
        for _ in range(passes):
            loss().backward()


def operated(model: Any, losses: dict[str, Callable[[], Any]], surgery: Any, passes: int) -> None:
    """The combined gradient."""
    model.zero_grad()
    for name, loss in losses.items():
        for number in range(passes):
            surgery.backward({name: loss()}, last=name == DOMAINS[-1] and number == passes - 1)


def by_definition(gradients: list[list[Any]], orders: Any) -> list[Any]:
    """PCGrad of each parameter, with clones and a value read by the host for each pair, as codes of it do."""
    found = []
    for number, rows in enumerate(zip(*gradients, strict=True)):
        flat = [row.flatten() for row in rows]
        left = [row.clone() for row in flat]
        others = [row.clone() for row in flat]
        for own, order in enumerate(orders[number].tolist()):
            for other in order:
                dot = (left[own] * others[other]).sum()
                square = (others[other] * others[other]).sum()
                if dot.item() < 0 and square.item() > 0:
                    left[own] = left[own] - dot / square * others[other]
        found.append(sum(left[1:], left[0]).view_as(rows[0]))
    return found


def surgery_alone(model: Any, losses: dict[str, Callable[[], Any]], repetitions: int) -> dict[str, Any]:
    """Row of the second table; by parameter."""
    import torch

    from lit_rl.functional.surgery import draw_orders
    from lit_rl.modules.surgery import GradientSurgery

    parameters = list(model.parameters())
    gradients = [list(torch.autograd.grad(loss(), parameters)) for loss in losses.values()]
    orders = draw_orders(0, len(parameters), len(DOMAINS))
    surgery, found = GradientSurgery(model, DOMAINS), dict[str, Any]()
    recorder = surgery.gradients

    def recorded() -> None:
        for name, rows in zip(DOMAINS, gradients, strict=True):
            with recorder.record(name):
                for parameter, gradient in zip(parameters, rows, strict=True):
                    parameter.grad = gradient.clone()  # surgery works in place

    def ours() -> None:
        surgery.finish(0)
        found["ours"] = [parameter.grad for parameter in parameters]

    def peer() -> None:
        found["peer"] = by_definition(gradients, orders)

    times: dict[str, Any] = {}
    for _ in range(repetitions + 1):  # the first is not timed; what fills the buffers never is
        recorded()
        for name, timing in alternate({"ours": ours, "peer": peer}, 1, warm=False).items():
            times.setdefault(name, []).append(timing.cpu[0])
    ours_s, peer_s = (sorted(times[name][1:])[repetitions // 2] for name in ("ours", "peer"))
    flat = {name: torch.cat([part.flatten() for part in parts]) for name, parts in found.items()}
    apart = float((flat["ours"] - flat["peer"]).norm() / flat["peer"].norm())
    mixed = sum(torch.cat([part.flatten() for part in rows]) for rows in gradients)
    return {
        "modules": len(parameters),
        "parameters": sum(parameter.numel() for parameter in parameters),
        "with clones, cpu s": peer_s,
        "ours, cpu s": ours_s,
        "times faster": peer_s / ours_s,
        "gradient differs": apart,
        "moved by surgery": float((flat["peer"] - mixed).norm() / mixed.norm()),
        "equal": apart < TOLERANCE,
        "reached": peer_s / ours_s >= TARGET,
    }


def whole_steps(
    model: Any, losses: dict[str, Callable[[], Any]], repetitions: int, passes: int
) -> list[dict[str, Any]]:
    """Rows of the first table."""
    from lit_rl.modules.surgery import GradientSurgery

    variants: dict[str, Callable[[], object]] = {"mixed": partial(plain, model, losses, passes)}
    for granularity in PASSES[passes]:
        surgery = GradientSurgery(model, DOMAINS, granularity)  # type: ignore[arg-type]
        variants[granularity] = partial(operated, model, losses, surgery, passes)
    memory = {}
    for name, step in variants.items():
        model.zero_grad()
        before = reset_peak_memory()
        step()
        memory[name] = peak_memory() - before
    times = alternate(variants, repetitions, warm=False)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return [
        {
            "tokens a step": len(DOMAINS) * passes * TOKENS[0] * TOKENS[1],
            "gradient": name,
            "cpu s": timing.cpu_median,
            "wall s": timing.wall_median,
            "more than mixed": (more := timing.cpu_median / times["mixed"].cpu_median - 1),
            "noise": timing.noise,
            "peak MiB": round(memory[name]),
            "gradients of memory": memory[name] / (parameters * 4 / 2**20),
            "reached": more <= SHARE,
        }
        for name, timing in times.items()
    ]


def main() -> int:
    """Measure; 1 where gradients differ."""
    settings = arguments(__doc__)
    repetitions = 3 if settings.quick else 5
    announce(
        "Gradient surgery",
        ("torch", "transformers"),
        settings.threads,
        f"Qwen2.5-0.5B with {LAYERS} layers, {len(DOMAINS)} domains of {TOKENS[0]} x {TOKENS[1]} tokens; medians of "
        f"{repetitions}",
    )
    model = language_model(settings.quick)
    losses = losses_of(model)
    print_table([row for passes in PASSES for row in whole_steps(model, losses, repetitions, passes)])
    print()
    row = surgery_alone(model, losses, repetitions)
    print_table([row])
    return 0 if row["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
