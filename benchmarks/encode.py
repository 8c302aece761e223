"""Encoding a corpus against ``SentenceTransformer.encode``: ``python -m benchmarks.encode``.

4,000 different texts of log-normal length (mean about 70 tokens, at most 256), both sides with their defaults
(sentence-transformers: batches of 32, sorted by characters). Tokenisation is part of the time on both sides. Below the
table stands where the time goes, and how fast an encoder would be that did nothing but the linear layers' products.
"""

import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.backbones import POOLING, save_backbone, sentence_transformer
from benchmarks.harness import (
    Timing,
    alternate,
    announce,
    arguments,
    log_normal_lengths,
    print_table,
    texts,
    words_of_one_token,
)

BACKBONES = (("bert", 6, 384), ("qwen3", 4, 256))
TARGET, TOLERANCE = 1.5, 1e-5
CHUNK_TOKENS = 512
KINDS = {  # kind of work: parts of the names of its operations
    "linear layers": ("mkldnn::_linear", "aten::addmm", "aten::mm", "aten::linear"),
    "attention": ("scaled_dot_product",),
    "activations, norms, sums": ("gelu", "silu", "layer_norm", "aten::mul", "aten::add", "aten::pow", "rsqrt", "mean"),
    "copies": ("aten::copy_", "aten::cat", "aten::index", "aten::gather", "aten::clone", "aten::embedding"),
}


def compare(
    family: str, layers: int, width: int, count: int, repetitions: int
) -> tuple[dict[str, Any], list[dict[str, Any]], str]:
    """Row of the table for one backbone, where the time of both sides goes, and what bounds it."""
    from lit_embed.modules.encoder import build_encoder
    from lit_embed.modules.tokenization import EncoderConfig

    with tempfile.TemporaryDirectory() as name:
        folder, tokenizer = save_backbone(family, layers, width, Path(name))
        corpus = texts(words_of_one_token(tokenizer), log_normal_lengths(count, 55, 0.7, 5, 250, 0), 0)
        encoder = build_encoder(folder, EncoderConfig(pooling=POOLING[family][0]))  # type: ignore[arg-type]
        peer = sentence_transformer(family, folder)
        found: dict[str, Any] = {}

        def ours() -> None:
            found["ours"] = encoder.encode(corpus, "passage", progress=False)

        def theirs() -> None:
            found["theirs"] = peer.encode(corpus, convert_to_tensor=True, show_progress_bar=False)

        times = alternate({"ours": ours, "theirs": theirs}, repetitions, warm=False)
        difference = float((found["ours"] - found["theirs"]).abs().max())
        ratio = times["theirs"].cpu_median / times["ours"].cpu_median
        sample = corpus[: count // 10]
        profiles = {
            "ours": shares(lambda: encoder.encode(sample, "passage", progress=False)),
            "theirs": shares(lambda: peer.encode(sample, convert_to_tensor=True, show_progress_bar=False)),
        }
        products = products_alone(encoder.model, sum(len(row) for row in tokenizer(corpus)["input_ids"]))
        row = {
            "backbone": f"{family} {layers}x{width}",
            "texts": count,
            "theirs cpu s": times["theirs"].cpu_median,
            "ours cpu s": times["ours"].cpu_median,
            "times faster": ratio,
            "wall": times["theirs"].wall_median / times["ours"].wall_median,
            "noise": max(timing.noise for timing in times.values()),
            "target": TARGET,
            "reached": ratio >= TARGET,
            "vectors differ": difference,
            "equal": difference < TOLERANCE,
        }
        profile = [
            {"backbone": row["backbone"], "side": side, **{kind: f"{share:.0%}" for kind, share in found.items()}}
            for side, found in profiles.items()
        ]
        bound = times["theirs"].cpu_median / products
        return row, profile, f"{row['backbone']}: the products alone take {products:.1f} s, {bound:.2f} times faster"


def shares(call: Callable[[], object]) -> dict[str, float]:
    """Share of a call's CPU time by kind of work; outside the operations of torch lie tokenisation and Python."""
    from torch.profiler import ProfilerActivity, profile

    started = time.process_time()
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        call()
    total = time.process_time() - started
    found = dict.fromkeys([*KINDS, "other operations"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, parts in KINDS.items() if any(part in event.key for part in parts)), None)
        found[kind or "other operations"] += event.self_cpu_time_total / 1e6 / total
    return {**found, "tokenisation, Python": 1 - sum(found.values())}


def products_alone(model: Any, tokens: int) -> float:
    """CPU seconds of a model's linear layers on so many tokens, in the faster layout and without padding."""
    import torch
    from torch import nn

    from lit_core.packed import packed_linears

    seconds = 0.0
    with torch.inference_mode(), packed_linears(model):
        for layer in [module for module in model.modules() if isinstance(module, nn.Linear)]:
            states = torch.randn(1, CHUNK_TOKENS, layer.in_features)
            timing = Timing()
            for _ in range(8):
                timing.add(lambda layer=layer, states=states: layer(states))
            seconds += timing.cpu_median * tokens / CHUNK_TOKENS
    return seconds


def main() -> int:
    """Compare on both backbones; 1 where vectors differ."""
    settings = arguments(__doc__)
    count, repetitions = (800, 2) if settings.quick else (4000, 2)
    announce(
        "Encoding",
        ("torch", "transformers", "sentence-transformers"),
        settings.threads,
        f"{count} different texts of log-normal length, defaults of both sides; seconds in all, median of alternating "
        "repetitions",
    )
    rows, profiles, bounds = zip(*(compare(*backbone, count, repetitions) for backbone in BACKBONES), strict=True)
    print_table(rows)
    print("\nWhere the CPU time goes, under the profiler")
    print_table([row for profile in profiles for row in profile])
    print("\n" + "\n".join(bounds))
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
