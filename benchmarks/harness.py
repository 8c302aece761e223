"""What all benchmarks share: alternating measurements, tables, a line about the machine, texts of log-normal length."""

import argparse
import importlib.metadata
import math
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

MEMORY_FIGURES = ("VmHWM", "VmRSS")  # peak and present resident memory in /proc/self/status


@dataclass
class Timing:
    """Seconds of each repetition.

    Args:
        cpu: CPU seconds of the process, all threads.
        wall: Wall seconds.
    """

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    def add(self, call: Callable[[], object]) -> None:
        """Time one call."""
        wall, cpu = time.perf_counter(), time.process_time()
        call()
        self.cpu.append(time.process_time() - cpu)
        self.wall.append(time.perf_counter() - wall)

    @property
    def cpu_median(self) -> float:
        """Median CPU seconds."""
        return statistics.median(self.cpu)

    @property
    def wall_median(self) -> float:
        """Median wall seconds."""
        return statistics.median(self.wall)

    @property
    def noise(self) -> float:
        """Largest deviation from the median of the CPU seconds, as a share of it."""
        return max(abs(value - self.cpu_median) for value in self.cpu) / self.cpu_median


def alternate(variants: Mapping[str, Callable[[], object]], repetitions: int, warm: bool = True) -> dict[str, Timing]:
    """Time variants in turn, A B A B, so that a slow minute of the machine falls on all of them.

    Args:
        variants: What to time, by name.
        repetitions: Timed calls of each.
        warm: Call each once beforehand, untimed.
    """
    timings = {name: Timing() for name in variants}
    for call in variants.values() if warm else ():
        call()
    for _ in range(repetitions):
        for name, call in variants.items():
            timings[name].add(call)
    return timings


def print_table(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows that have the same keys as an aligned table; floats with three significant digits."""
    cells = [list(rows[0])] + [[_cell(value) for value in row.values()] for row in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(len(cells[0]))]
    for number, line in enumerate(cells):
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)
        if number == 0:
            print("  ".join("-" * width for width in widths), flush=True)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        digits = 0 if value == 0 or not math.isfinite(value) else max(0, 2 - math.floor(math.log10(abs(value))))
        return f"{value:.{min(digits, 4)}f}" if value == 0 or abs(value) >= 1e-3 else f"{value:.1e}"
    return str(value)


def arguments(description: str) -> argparse.Namespace:
    """Read ``--quick`` and ``--threads``, set the threads, and print what is measured on what."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--quick", action="store_true", help="smaller input and fewer repetitions; noisier")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch (default 1)")
    settings = parser.parse_args()
    if settings.threads < 1:
        parser.error(f"--threads must be at least 1, got {settings.threads}")
    # before torch is imported: its thread pools read this once; child processes inherit it
    os.environ["OMP_NUM_THREADS"] = str(settings.threads)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is downloaded
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(settings.threads)
    return settings


def announce(title: str, packages: Sequence[str], threads: int, note: str) -> None:
    """Print a heading with versions, threads, the load of the machine and what is measured."""
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    print(f"{title}\n{note}")
    print(
        f"{platform.machine()}, {os.cpu_count()} cores, {threads} thread(s), load before the start "
        f"{os.getloadavg()[0]:.1f}; python {platform.python_version()}, {versions}\n",
        flush=True,
    )


def words_of_one_token(tokenizer: Any, most: int = 1500) -> list[str]:
    """Words of letters that the tokenizer keeps whole, so that a text of n words has n tokens."""
    found = []
    for token in sorted(tokenizer.get_vocab()):
        word = token.removeprefix("Ġ")
        if token != word and word.isascii() and word.isalpha() and len(word) > 2:
            found.append(word)
    random.Random(0).shuffle(found)
    return found[:most]


def texts(words: Sequence[str], lengths: Sequence[int], seed: int) -> list[str]:
    """Random texts, all different, with the given numbers of words."""
    generator = random.Random(seed)
    made: dict[str, None] = {}
    for length in lengths:
        text = " ".join(generator.choices(words, k=length))
        while text in made:
            text = " ".join(generator.choices(words, k=length))
        made[text] = None
    return list(made)


def log_normal_lengths(count: int, median: float, sigma: float, least: int, most: int, seed: int) -> list[int]:
    """Whole lengths from a log-normal distribution, clipped."""
    generator = random.Random(seed)
    return [min(most, max(least, round(median * math.exp(generator.gauss(0, sigma))))) for _ in range(count)]


def reset_peak_memory() -> float:
    """Set the peak resident memory back to the present one and return that in MiB (Linux)."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as stream:
        stream.write("5")
    return _memory()[MEMORY_FIGURES[1]]


def peak_memory() -> float:
    """Peak resident memory since the last reset, in MiB (Linux)."""
    return _memory()[MEMORY_FIGURES[0]]


def _memory() -> dict[str, float]:
    with open("/proc/self/status", encoding="ascii") as stream:
        pairs = (line.split(":", 1) for line in stream)
        return {name: int(value.split()[0]) / 1024 for name, value in pairs if name in MEMORY_FIGURES}
