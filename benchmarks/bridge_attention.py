"""A reconstruction step through the bridge (CoCoA, stage 2): ``python -m benchmarks.bridge_attention``.

Rows ``[A, E, B]``, B with 0.7 of its tokens hidden, forward and backward pass of a small decoder with its head:

- ``dense``: one square mask, what one writes first, and the reference;
- ``split``: two or three attention calls on slices, no mask where rows are equally long;
- ``two_pass``: contexts with a cache, then targets on the end token (not under ``collaborative``).

Times are measured in one process, in turn; peak memory in a process for each: what a step adds to it with the model
built. ``pairs`` are those of query and key that a form computes, as a share of all. ``ragged`` has rows of half to the
full length, where split adds padding.
"""

import sys
from collections.abc import Callable, Sequence
from multiprocessing import get_context
from typing import Any, NamedTuple

from benchmarks.harness import alternate, announce, arguments, peak_memory, print_table, reset_peak_memory

LAYERS, WIDTH, HEADS, VOCABULARY = 2, 256, 4, 4_096
MASK_RATE = 0.7


class Case(NamedTuple):
    """What is measured: rows, tokens of A and of B, and whether rows differ in length."""

    rows: int
    context: int
    target: int
    ragged: bool = False


CASES = {
    "256 + 64": Case(8, 256, 64),
    "1280 + 64": Case(2, 1280, 64),
    "64 + 64": Case(20, 64, 64),
    "256 + 256": Case(6, 256, 256),
    "ragged 256 + 256": Case(6, 256, 256, ragged=True),
}
VARIANTS = [("collaborative", "dense"), ("collaborative", "split")]
VARIANTS += [(bridge, form) for bridge in ("strict", "one_way") for form in ("dense", "split", "two_pass")]
MEASURED = ("collaborative", "strict")  # peak memory: one_way has that of strict
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def build() -> Any:
    """A Qwen3 with tied embeddings, always with the same random weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from lit_core.presets import preset_config
    from lit_embed.modules.bridge_attention import use_bridge_attention

    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "num_hidden_layers": LAYERS,
        "intermediate_size": 3 * WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS // 2,
        "head_dim": WIDTH // HEADS,
        "max_position_embeddings": 4096,
    }
    model = AutoModelForCausalLM.from_config(preset_config("tiny-qwen3", **sizes)).train()
    use_bridge_attention(model)
    return model


def step(model: Any, case: Case, bridge: str, form: str) -> Callable[[], Any]:
    """The loss of one variant on the rows of a case, padded on the right as an encoder would."""
    import torch

    from lit_embed.functional.reconstruction import draw_masked, mask_tokens, mntp_loss
    from lit_embed.modules.bridge_decoder import DecoderRows, bridge_states

    generator = torch.Generator().manual_seed(0)

    def lengths(longest: int) -> Any:
        least = longest // 2 if case.ragged else longest
        return torch.randint(least, longest + 1, (case.rows,), generator=generator)

    end, target = lengths(case.context), lengths(case.target)
    columns = torch.arange(int((end + 1 + target).max()))
    valid = columns < (end + 1 + target)[:, None]
    ids = torch.randint(1, VOCABULARY - 8, valid.shape, generator=generator)
    masked = draw_masked(valid & (columns > end[:, None]), MASK_RATE, range(case.rows))
    hidden, labels = mask_tokens(ids, masked, VOCABULARY - 1)
    rows, weight = DecoderRows(valid, hidden), model.lm_head.weight

    def loss() -> Any:
        return mntp_loss(bridge_states(model, rows, end, bridge, form), labels, valid, weight)  # type: ignore[arg-type]

    return loss


def gradients(model: Any, loss: Any) -> dict[str, Any]:
    """Gradients of all parameters."""
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> float:
    """Norm of the difference of two sets of gradients, as a share of the second's norm."""
    if ours.keys() != theirs.keys():
        raise ValueError("the variants train different parameters")
    squares = [((ours[name] - theirs[name]).square().sum(), theirs[name].square().sum()) for name in theirs]
    apart, norm = (sum(float(pair[side]) for pair in squares) for side in (0, 1))
    return (apart / norm) ** 0.5


def measure_memory(case: Case, bridge: str, form: str) -> float:
    """In this process: what the first step adds at its peak, in MiB."""
    model = build()
    loss = step(model, case, bridge, form)
    before = reset_peak_memory()
    loss().backward()
    return peak_memory() - before


def peaks_of(cases: Sequence[Case]) -> dict[tuple[Case, str, str], float]:
    """Peak of every case and variant, each in a process of its own, forked before this one has computed anything."""
    from transformers import Qwen3ForCausalLM  # noqa: F401 (once for all of them)

    import lit_embed.modules.bridge_decoder  # noqa: F401

    wanted = [(case, *variant) for case in cases for variant in VARIANTS if variant[0] in MEASURED]
    with get_context("fork").Pool(1, maxtasksperchild=1) as pool:
        return dict(zip(wanted, pool.starmap(measure_memory, wanted, chunksize=1), strict=True))


def share_of_pairs(case: Case, bridge: str, form: str) -> float:
    """Pairs that a form computes for the longest row, as a share of all."""
    from lit_embed.modules.bridge_attention import allowed_pairs

    if form == "dense":
        return 1.0
    return allowed_pairs(bridge, case.context, case.target) / (case.context + 1 + case.target) ** 2  # type: ignore[arg-type]


def compare(
    name: str, case: Case, variants: Sequence[tuple[str, str]], peaks: dict[tuple[Case, str, str], float], times: int
) -> list[dict[str, Any]]:
    """Rows of the table for one case."""
    model = build()
    steps = {variant: step(model, case, *variant) for variant in variants}
    results = {}
    for variant, loss in steps.items():
        value = loss()
        results[variant] = (float(value.detach()), gradients(model, value))
    calls = {" ".join(variant): (lambda loss=loss: loss().backward()) for variant, loss in steps.items()}
    timings = alternate(calls, times, warm=False)  # they have all run
    table = []
    for bridge, form in variants:
        timing, dense = timings[f"{bridge} {form}"], timings[f"{bridge} dense"]
        of = bridge if bridge in MEASURED else MEASURED[1]
        (loss, grads), (expected, reference) = results[bridge, form], results[bridge, "dense"]
        apart = difference(grads, reference)
        table.append(
            {
                "A + B": name,
                "rows": case.rows,
                "bridge": bridge,
                "form": form,
                "pairs": share_of_pairs(case, bridge, form),
                "cpu s": timing.cpu_median,
                "wall s": timing.wall_median,
                "noise": timing.noise,
                "times faster": dense.cpu_median / timing.cpu_median,
                "peak MiB": peaks[case, of, form],
                "share of peak": peaks[case, of, form] / peaks[case, of, "dense"],
                "loss differs": abs(loss - expected),
                "gradient differs": apart,
                "equal": abs(loss - expected) < LOSS_TOLERANCE and apart < GRADIENT_TOLERANCE,
            }
        )
    return table


def main() -> int:
    """Compare the forms; 1 where loss or gradients differ."""
    settings = arguments(__doc__)
    announce(
        "Reconstruction step through the bridge",
        ("torch", "transformers"),
        settings.threads,
        f"Qwen3 {LAYERS}x{WIDTH}, vocabulary {VOCABULARY:,}, {MASK_RATE} of B hidden; against the square mask",
    )
    cases = {name: case._replace(rows=case.rows // 2) if settings.quick else case for name, case in CASES.items()}
    variants = [variant for variant in VARIANTS if variant[0] in MEASURED] if settings.quick else VARIANTS
    peaks, times = peaks_of(list(cases.values())), 3 if settings.quick else 7
    table = [row for name, case in cases.items() for row in compare(name, case, variants, peaks, times)]
    print_table(table)
    return 0 if all(row["equal"] for row in table) else 1


if __name__ == "__main__":
    sys.exit(main())
