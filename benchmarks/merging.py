"""Merging five model folders against a plain merge that stacks every tensor: ``python -m benchmarks.merging``.

Weights of the shape of Qwen2.5-0.5B in bfloat16, five models around a base. Each variant runs in a process of its own,
so that its peak is its own: what the process holds beyond what it held with its libraries loaded. The plain merge
stacks a tensor of all models in float32, merges the stack and keeps the result for one file, as merge tools do. Time is
set against copying what a merge has to move at least: every model read once and one written. The models are put out of
the page cache before each run, so that the first pass of a merge reads from the disk; what the disk itself, or a host,
caches is not. Results have to be equal but for rounding to bfloat16.

Where mergekit is installed (0.1.5 or later) its functions on the same stacks are further rows, which need not be equal:
norms of long tensors that are summed in float32 are off by up to a thousandth, and of equal magnitudes, of which there
are many in bfloat16, TIES keeps those that an unstable sort puts first.
"""

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.harness import announce, arguments, peak_memory, print_table, reset_peak_memory

SIZES = {"width": 896, "inner": 4864, "key": 128, "layers": 24, "vocabulary": 151_936}
QUICK = {**SIZES, "layers": 2, "vocabulary": 16_000}
MODELS, DRIFT = 5, 0.02
METHODS: dict[str, dict[str, Any]] = {"linear": {}, "multislerp": {"space": "weight"}, "ties": {"density": 0.2}}
BUDGET = 1.5  # of the memory that chunks may take
SPEED = 0.6  # least share of the copy's speed, for the linear merge
BLOCK = 2**20


def shapes(sizes: dict[str, int]) -> dict[str, tuple[int, ...]]:
    """Tensors of a Qwen2 decoder with tied embeddings."""
    width, inner, key = sizes["width"], sizes["inner"], sizes["key"]
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (sizes["vocabulary"], width)}
    for layer in range(sizes["layers"]):
        parts = {
            "self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width), "self_attn.v_proj": (key, width),
            "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
            "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
        }  # fmt: skip
        found |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in parts.items()}
    return {**found, "model.norm.weight": (width,)}


def write_models(root: Path, sizes: dict[str, int], count: int) -> None:
    """A base, and models around it."""
    import torch
    from safetensors.torch import save_file

    def model(number: int) -> dict[str, Any]:
        own, shared = torch.Generator().manual_seed(1 + number), torch.Generator().manual_seed(0)
        state = {}
        for name, shape in shapes(sizes).items():
            tensor = torch.randn(shape, generator=shared)
            if number:
                tensor += DRIFT * torch.randn(shape, generator=own)
            state[name] = (0.02 * tensor).bfloat16()
        return state

    for number in range(count + 1):
        folder = root / (f"m{number}" if number else "base")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "dtype": "bfloat16"}))
        save_file(model(number), folder / "model.safetensors", metadata={"format": "pt"})


def plain_merge(merge: Callable[[str, Any, Any], Any]) -> Callable[[list[Path], Path, Path], None]:
    """Merge files by stacking each tensor in float32."""

    def run(models: list[Path], base: Path, output: Path) -> None:
        import torch
        from safetensors import safe_open
        from safetensors.torch import save_file

        merged = {}
        with safe_open(str(base / "model.safetensors"), "pt") as file:
            names = list(file.keys())
        for name in names:
            rows = []
            for folder in [base, *models]:  # opened anew, so that what is mapped is let go
                with safe_open(str(folder / "model.safetensors"), "pt") as file:
                    rows.append(file.get_tensor(name).float())
            stack = torch.stack(rows)
            del rows
            merged[name] = merge(name, stack[0], stack[1:]).bfloat16()
        output.mkdir()
        save_file(merged, output / "model.safetensors", metadata={"format": "pt"})

    return run


def by_formula(method: str) -> Callable[[str, Any, Any], Any]:
    """A merge of a stack as it is written down."""

    def merge(_: str, base: Any, stack: Any) -> Any:
        import torch

        flat = stack.view(len(stack), -1)
        if method == "linear":
            return stack.mean(0)
        if method == "multislerp":
            norms = flat.norm(dim=1, keepdim=True, dtype=torch.float64)  # in float32 a long sum is off by a thousandth
            mean = (flat / norms).mean(0)
            return (mean / mean.norm() * norms.mean()).view_as(base)
        deltas = flat - base.view(1, -1)
        kept = max(1, int(METHODS["ties"]["density"] * base.numel()))
        for row in deltas:
            sizes = row.abs()
            least = sizes.kthvalue(base.numel() - kept + 1).values
            equal = (sizes == least).nonzero().flatten()
            mask = sizes > least
            mask[equal[: kept - int(mask.sum())]] = True
            row.mul_(mask)
        sign = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
        agree = deltas.sign() == sign
        return base + ((deltas * agree).sum(0) / agree.sum(0).clamp(min=1)).view_as(base)

    return merge


def by_mergekit(method: str) -> Callable[[str, Any, Any], Any]:
    """A merge of a stack by mergekit."""

    def merge(_: str, base: Any, stack: Any) -> Any:
        from mergekit.merge_methods import merge_tensors

        parameters = {"weight": [1.0] * len(stack)}
        if method == "ties":
            parameters["density"] = [METHODS["ties"]["density"]] * len(stack)
            return merge_tensors([base, *stack], method, parameters=parameters, base_index=0)
        return merge_tensors(list(stack), method, parameters=parameters)

    return merge


def copy(models: list[Path], base: Path, output: Path) -> None:
    """Read all models and write one."""
    output.mkdir()
    buffer = bytearray(BLOCK)
    for number, folder in enumerate(models):
        with (
            (folder / "model.safetensors").open("rb", buffering=0) as source,
            (output / "model.safetensors").open("ab", buffering=0) as target,
        ):
            while size := source.readinto(buffer):
                if number == 0:
                    target.write(memoryview(buffer)[:size])


def ours(method: str) -> Callable[[list[Path], Path, Path], None]:
    """Our merge; only TIES reads the base."""

    def run(models: list[Path], base: Path, output: Path) -> None:
        from lit_core.merging import merge_folders

        merge_folders(models, output, method, base=base if method == "ties" else None, **METHODS[method])

    return run


def variant(name: str) -> Callable[[list[Path], Path, Path], None]:
    """What to measure, by name: ``copy``, or who merges and how."""
    who, _, method = name.partition(" ")
    if who == "copy":
        return copy
    return ours(method) if who == "ours" else plain_merge((by_formula if who == "plain" else by_mergekit)(method))


def evict(folders: list[Path]) -> None:
    """Put files of weights out of the page cache (Linux)."""
    for folder in folders:
        with (folder / "model.safetensors").open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(name: str, root: Path, count: int, small: Path) -> None:
    """Run a variant once on small models, for the libraries, then measured; prints JSON."""
    call = variant(name)
    for folder in (small, root):
        output = folder / "out"
        evict([folder / "base", *(folder / f"m{number}" for number in range(1, count + 1))])
        before, wall, cpu = reset_peak_memory(), time.perf_counter(), time.process_time()
        call([folder / f"m{number}" for number in range(1, count + 1)], folder / "base", output)
        found = {
            "peak": peak_memory() - before,
            "wall": time.perf_counter() - wall,
            "cpu": time.process_time() - cpu,
        }
        kept = folder / name.replace(" ", "_")
        shutil.rmtree(kept, ignore_errors=True)
        output.rename(kept)
    print(json.dumps(found))


def in_a_process(name: str, root: Path, small: Path, count: int, repetitions: int) -> dict[str, float]:
    """Medians over processes."""
    call = [sys.executable, "-m", "benchmarks.merging", "--measure", name, str(root), str(small), str(count)]
    runs = []
    for _ in range(repetitions):
        done = subprocess.run(call, capture_output=True, text=True, check=False, env={**os.environ})
        if done.returncode:
            raise RuntimeError(done.stderr)
        runs.append(json.loads(done.stdout.splitlines()[-1]))
    return {key: sorted(run[key] for run in runs)[len(runs) // 2] for key in runs[0]}


def difference(one: Path, two: Path) -> tuple[float, float]:
    """Share of entries that are not the same, and the relative distance of all."""
    from safetensors import safe_open

    apart = square = norm = total = 0.0
    with (
        safe_open(str(one / "model.safetensors"), "pt") as first,
        safe_open(str(two / "model.safetensors"), "pt") as second,
    ):
        for name in first.keys():  # noqa: SIM118
            a, b = first.get_tensor(name).float(), second.get_tensor(name).float()
            apart, total = apart + float((a != b).sum()), total + a.numel()
            square, norm = square + float((a - b).square().sum()), norm + float(b.square().sum())
    return apart / total, (square / norm) ** 0.5


def compare(root: Path, small: Path, count: int, repetitions: int) -> list[dict[str, Any]]:
    """Rows of the table."""
    from importlib.util import find_spec

    size = sum((root / f"m{number}" / "model.safetensors").stat().st_size for number in range(1, count + 1)) / 2**20
    floor = in_a_process("copy", root, small, count, repetitions)
    shutil.rmtree(root / "copy")
    rows = [row("copy", floor, floor, size, None)]
    for method in METHODS:
        peers = ["plain", *(["mergekit"] if find_spec("mergekit") else [])]
        found = {who: in_a_process(f"{who} {method}", root, small, count, repetitions) for who in [*peers, "ours"]}
        for who, figures in found.items():
            gap = difference(root / f"ours_{method}", root / f"{who}_{method}")
            rows.append(row(f"{who} {method}", figures, floor, size, gap))
        for who in found:
            shutil.rmtree(root / f"{who}_{method}")
    return rows


def row(name: str, figures: dict[str, float], floor: dict[str, float], size: float, gap: Any) -> dict[str, Any]:
    """One row; sizes in MiB."""
    from lit_core.merging.chunks import CHUNK_BYTES

    reached = not name.startswith("ours") or figures["peak"] * 2**20 <= BUDGET * CHUNK_BYTES
    speed = floor["wall"] / figures["wall"]
    return {
        "variant": name,
        "cpu s": figures["cpu"],
        "wall s": figures["wall"],
        "MiB/s read": round(size / figures["wall"]),
        "speed / copy": speed,
        "peak MiB": round(figures["peak"]),
        "entries differ": 0.0 if gap is None else gap[0],
        "distance": 0.0 if gap is None else gap[1],
        # of two merges that differ by float32 sums one entry in a thousand is rounded to its neighbour, 2^-8 away
        "equal": gap is None or (gap[0] < 0.02 and gap[1] < 2e-4),
        "reached": reached and (name != "ours linear" or speed >= SPEED),
    }


def main() -> int:
    """Compare; 1 where results differ."""
    if sys.argv[1:2] == ["--measure"]:
        name, root, small, count = sys.argv[2:]
        import torch

        torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
        measure(name, Path(root), int(count), Path(small))
        return 0
    settings = arguments(__doc__)
    sizes, repetitions = (QUICK, 3) if settings.quick else (SIZES, 3)
    entries = sum(math.prod(shape) for shape in shapes(sizes).values())
    announce(
        "Merging folders",
        ("torch", "safetensors"),
        settings.threads,
        f"{MODELS} models of {entries / 1e6:.0f} million parameters in bfloat16; medians of {repetitions} processes",
    )
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        small = root / "small"
        small.mkdir()
        write_models(small, {**sizes, "width": 16, "inner": 16, "key": 8, "layers": 1, "vocabulary": 50}, MODELS)
        write_models(root, sizes, MODELS)
        rows = compare(root, small, MODELS, repetitions)
    print_table(rows)
    return 0 if all(row["equal"] for row in rows if not row["variant"].startswith("mergekit")) else 1


if __name__ == "__main__":
    sys.exit(main())
