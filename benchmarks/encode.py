"""Encoding a corpus against ``SentenceTransformer.encode``: ``python -m benchmarks.encode``.

4,000 different texts of log-normal length (mean about 70 tokens, at most 256), both sides with their defaults
(sentence-transformers: batches of 32, sorted by characters). Tokenisation is part of the time on both sides.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.backbones import POOLING, save_backbone, sentence_transformer
from benchmarks.harness import (
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


def compare(family: str, layers: int, width: int, count: int, repetitions: int) -> dict[str, Any]:
    """Row of the table for one backbone."""
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
        return {
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
    rows = [compare(*backbone, count, repetitions) for backbone in BACKBONES]
    print_table(rows)
    return 0 if all(row["equal"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
