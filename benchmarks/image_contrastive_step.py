"""A contrastive step over images and texts (CoCoA, stage 3): ``python -m benchmarks.image_contrastive_step``.

Rows of three kinds in one batch, as in mixed training: a picture and a short instruction against its caption, a caption
against its picture, a picture and a question against a short answer; pictures have 4 to 36 tokens. Forward and backward
pass from patches and token ids, same weights, same loss:

- ``plain``: all queries padded to the longest in one forward pass, all targets in another;
- ``sorted``: queries and targets together in chunks of like length;
- ``cached``: the same by GradCache, for batches whose activations do not fit.

Times are measured in one process, in turn; peak memory in a process for each: what a step adds with the model built.
"""

import random
import sys
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any

from benchmarks.harness import alternate, announce, arguments, peak_memory, print_table, reset_peak_memory

BACKBONES = ("tiny-qwen2-vl", "tiny-qwen2_5-vl")
VARIANTS = ("plain", "sorted", "cached")
SIDES, TEMPERATURE = (56, 112, 168), 0.05
PAIRS, QUICK_PAIRS = 96, 48
TARGET = 1.0  # times faster than plain
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4


def pairs(count: int) -> list[Any]:
    """Rows of a batch; no target occurs twice."""
    from lit_embed.data.scenes import SceneConfig, build_scenes
    from lit_embed.data.scenes.render import SceneImage
    from lit_embed.data.scenes.wording import REPRESENT, caption
    from lit_embed.items import MARKER, Item
    from lit_embed.multimodal import ContrastiveRow

    scenes = build_scenes(SceneConfig(train_scenes=count, eval_scenes=4)).train
    rng, rows = random.Random(0), []
    for number, scene in enumerate(scenes):
        picture = SceneImage(scene, rng.choice(SIDES))
        query, positive = (
            (Item(f"{MARKER}\nFind a caption of the picture.", picture), Item(caption(rng, scene))),
            (Item(f"Find the picture with this caption: {caption(rng, scene)}"), Item(REPRESENT, picture)),
            (Item(f"{MARKER}\nAnswer the question about the picture: which number does it have?", picture),
             Item(f"number {number}")),
        )[number % 3]  # fmt: skip
        rows.append(ContrastiveRow(query, positive, None, "mixed", number))
    return rows


def build(backbone: str, count: int) -> tuple[Any, Any]:
    """The method with random weights, and a batch."""
    from lit_core.backbones import BackboneConfig
    from lit_embed.methods.cocoa import CoCoA
    from lit_embed.modules.multimodal_tokenization import MultimodalConfig

    loading = BackboneConfig(dtype="float32")
    method = CoCoA(backbone, temperature=TEMPERATURE, loading=loading, encoder=MultimodalConfig(max_tokens=256))
    method.configure_model()
    method.train()
    return method, method.multimodal_collator("contrastive", train=True)(pairs(count))


def plain_loss(method: Any, batch: Any) -> Any:
    """InfoNCE of two padded forward passes."""
    import torch

    encoder, count = method.encoder, batch.queries
    queries = encoder.encode_padded(encoder.pad_chunk(batch.tokens, range(count))[0])
    targets = encoder.encode_padded(encoder.pad_chunk(batch.tokens, range(count, len(batch.tokens)))[0])
    return torch.nn.functional.cross_entropy(queries @ targets.T / TEMPERATURE, batch.targets)


def steps(method: Any, batch: Any) -> dict[str, Callable[[], float]]:
    """Each variant's step; it leaves gradients and returns the loss."""
    from lit_embed.modules.gradcache import cached_backward

    def stepped(loss_of: Callable[[], Any]) -> Callable[[], float]:
        def run() -> float:
            method.zero_grad()
            loss = loss_of()
            loss.backward()
            return float(loss.detach())

        return run

    def cached() -> float:
        method.zero_grad()
        return float(cached_backward(method.encoder, batch.tokens, lambda vectors: method.loss(vectors, batch)))

    ours = stepped(lambda: method.loss(method.encoder(batch.tokens), batch))
    return {"plain": stepped(lambda: plain_loss(method, batch)), "sorted": ours, "cached": cached}


def measure_memory(backbone: str, count: int, variant: str) -> float:
    """In this process: what the first step adds at its peak, in MiB."""
    step = steps(*build(backbone, count))[variant]
    before = reset_peak_memory()
    step()
    return peak_memory() - before


def gradients(method: Any) -> Any:
    """All gradients in one vector."""
    import torch

    return torch.cat([parameter.grad.flatten() for parameter in method.parameters() if parameter.grad is not None])


def compare(backbone: str, count: int, peaks: dict[str, float], times: int) -> list[dict[str, Any]]:
    """Rows of the table for one backbone."""
    method, batch = build(backbone, count)
    calls = steps(method, batch)
    results = {name: (call(), gradients(method)) for name, call in calls.items()}
    timings = alternate(calls, times, warm=False)  # they have all run
    lengths, queries = batch.tokens.lengths, batch.queries
    padded = max(lengths[:queries]) * queries + max(lengths[queries:]) * (len(lengths) - queries)
    expected, reference = results["plain"]
    table = []
    for name, timing in timings.items():
        loss, found = results[name]
        apart = float((found - reference).norm() / reference.norm())
        ratio = timings["plain"].cpu_median / timing.cpu_median
        table.append(
            {
                "backbone": backbone,
                "step": name,
                "pairs": queries,
                "tokens": sum(lengths),
                "plain pads to": padded,
                "cpu s": timing.cpu_median,
                "noise": timing.noise,
                "times faster": ratio,
                "reached": name != "sorted" or ratio >= TARGET,
                "peak MiB": peaks[name],
                "share of peak": peaks[name] / peaks["plain"],
                "loss differs": abs(loss - expected),
                "gradient differs": apart,
                "equal": abs(loss - expected) < LOSS_TOLERANCE and apart < GRADIENT_TOLERANCE,
            }
        )
    return table


def main() -> int:
    """Compare the steps; 1 where loss or gradients differ."""
    settings = arguments(__doc__)
    count = QUICK_PAIRS if settings.quick else PAIRS
    announce(
        "Contrastive step over images and texts",
        ("torch", "transformers"),
        settings.threads,
        f"{count} pairs; forward + backward, same weights; against two padded forward passes",
    )
    wanted = [(backbone, count, variant) for backbone in BACKBONES for variant in VARIANTS]
    with get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        measured = dict(zip(wanted, pool.starmap(measure_memory, wanted, chunksize=1), strict=True))
    rows = []
    for backbone in BACKBONES:
        peaks = {variant: measured[backbone, count, variant] for variant in VARIANTS}
        rows += compare(backbone, count, peaks, 3 if settings.quick else 7)
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
