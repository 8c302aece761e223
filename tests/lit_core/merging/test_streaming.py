"""Folders that hold nothing but numbers: what is streamed is what is merged in memory, bit for bit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lit_core.errors import InputError
from lit_core.merging import METHODS, merge, merge_folders
from lit_core.merging.model_folder import INDEX, WEIGHTS

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    *((method, {}) for method in METHODS),
    ("multislerp", {"tangent": "log", "space": "weight"}),
    ("ties", {"density": 0.01, "consensus": "count"}),
    ("dare_linear", {"rescale": "l1"}),
    ("dare_ties", {"rescale": "l1", "density": 0.1}),
    ("sce", {"select_topk": 0.1}),
]


def tensors(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Several shapes, whole numbers, one tensor without entries, and one of another type."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"b.embed": (40, 7), "a.norm": (7,), "a.experts": (2, 3, 5), "scalar": (), "empty": (0, 3)}
    found = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    coarse = torch.randint(-2, 3, (50,), generator=generator).to(torch.float16)  # magnitudes that are equal
    return {**found, "coarse": coarse, "ids": torch.arange(9), "flags": torch.tensor([True, False, True])}


def write(folder: Path, state: Mapping[str, Tensor], config: Mapping[str, Any] | None = None, shards: int = 1) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"model_type": "numbers", **(config or {})}))
    names = sorted(state)
    if shards == 1:
        save_file(dict(state), folder / WEIGHTS)
        return folder
    weight_map = {name: f"model-{number % shards + 1}.safetensors" for number, name in enumerate(names)}
    for file in set(weight_map.values()):
        save_file({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    return folder


def same(one: Mapping[str, Tensor], two: Mapping[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(
        one[name].dtype == two[name].dtype and one[name].shape == two[name].shape and torch.equal(one[name], two[name])
        for name in one
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("method", "options"), OPTIONS)
def test_a_streamed_merge_is_the_dense_one(
    tmp_path: Path, method: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    states, base = [tensors(seed, dtype) for seed in range(3)], tensors(9, dtype)
    folders = [write(tmp_path / f"m{number}", state, shards=number + 1) for number, state in enumerate(states)]
    root = write(tmp_path / "base", base)
    weights = [0.2, 0.5, 0.3] if METHODS[method].weighted else None
    for chunk_bytes in (2**24, 2000):  # the second cuts tensors into chunks of 15 entries
        dense = merge(states, method, weights, base, chunk_bytes=chunk_bytes, **options)
        out = tmp_path / f"out{chunk_bytes}"
        merge_folders(folders, out, method, weights, root, chunk_bytes=chunk_bytes, **options)
        assert same(load_file(out / WEIGHTS), dense)
    one, two = (load_file(tmp_path / f"out{chunk_bytes}" / WEIGHTS) for chunk_bytes in (2**24, 2000))
    if dtype == torch.float64:  # sums over a tensor differ in the last bits
        torch.testing.assert_close(one, two, rtol=1e-13, atol=1e-14)
    else:
        assert same(one, two)


def test_parts_of_bounded_size_and_a_type_of_its_own(tmp_path: Path) -> None:
    states = [tensors(0), tensors(1, torch.bfloat16)]
    folders = [write(tmp_path / f"m{n}", state, {"dtype": "float32", "text": {"torch_dtype": "float32"}})
               for n, state in enumerate(states)]  # fmt: skip
    with pytest.raises(InputError, match="name the dtype of the result"):
        merge_folders(folders, tmp_path / "out", "linear")
    merge_folders(folders, tmp_path / "out", "linear", dtype="float16", shard_bytes=300)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert files == sorted(set(index["weight_map"].values()))
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    loaded: dict[str, Tensor] = {}
    for file in files:
        part = load_file(tmp_path / "out" / file)
        assert len(part) == 1 or sum(tensor.nbytes for tensor in part.values()) <= 300
        assert set(part) == {name for name, at in index["weight_map"].items() if at == file}
        loaded |= part
    assert same(loaded, merge(states, "linear", dtype=torch.float16))
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in loaded.values())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config == {"model_type": "numbers", "dtype": "float16", "text": {"torch_dtype": "float16"}}


def test_the_manifest_says_how_it_was_made(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"m{seed}", tensors(seed)) for seed in range(2)]
    base = write(tmp_path / "base", tensors(5), {"note": 1})
    told = merge_folders(folders, tmp_path / "out", "dare_ties", [1, 2], base, seed=3)
    manifest = json.loads((tmp_path / "out" / "merge.json").read_text())
    assert manifest == told
    assert (manifest["method"], manifest["weights"]) == ("dare_ties", [1, 2])
    assert manifest["options"] == {
        "density": 0.5, "rescale": "density", "lam": 1.0, "normalize": False, "seed": 3}  # fmt: skip
    assert [entry["path"] for entry in manifest["models"]] == [str(folder) for folder in folders]
    assert manifest["base"]["files"] == {WEIGHTS: (base / WEIGHTS).stat().st_size}
    assert manifest["base"]["config_sha256"] != manifest["models"][0]["config_sha256"]
    assert manifest["files_from"] == str(base)
    assert "torch" in manifest["versions"]
    merge_folders([tmp_path / "out", folders[0]], tmp_path / "again", "linear")  # not one that was copied
    assert json.loads((tmp_path / "again" / "merge.json").read_text())["method"] == "linear"


def test_fallbacks_are_told(tmp_path: Path) -> None:
    state = {"turned": torch.ones(4), "kept": torch.ones(4), "zero": torch.zeros(2)}
    folders = [write(tmp_path / "m0", state), write(tmp_path / "m1", {**state, "turned": -state["turned"]})]
    told = merge_folders(folders, tmp_path / "out", "multislerp")
    assert told["notes"] == {"turned": ["the directions cancel, and the linear mean was taken"]}


def test_a_killed_merge_leaves_nothing_and_the_next_one_works(tmp_path: Path) -> None:
    folders = [write(tmp_path / f"m{seed}", tensors(seed)) for seed in range(2)]
    out = tmp_path / "out"
    program = (
        "import os, signal, sys\n"
        "from lit_core.merging import chunks, merge_folders\n"
        "old, calls = chunks.Stack.combine, []\n"
        "def combine(*arguments):\n"
        "    for part in old(*arguments):\n"
        "        yield part\n"
        "        calls.append(1)\n"
        "        if len(calls) == 5:\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n"
        "chunks.Stack.combine = combine\n"
        "merge_folders(sys.argv[1:3], sys.argv[3], 'linear', chunk_bytes=2000)\n"
    )
    root = Path(__file__).parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    call = [sys.executable, "-c", program, *map(str, folders), str(out)]
    assert subprocess.run(call, env=environment, capture_output=True, check=False).returncode == -signal.SIGKILL
    assert not out.exists()
    assert [path.name for path in tmp_path.glob(".*")] == [".out.tmp"]
    merge_folders(folders, out, "linear")
    assert same(load_file(out / WEIGHTS), merge([tensors(0), tensors(1)], "linear"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize(
    ("method", "options"),
    [("linear", {}), ("multislerp", {}), ("ties", {}), ("dare_ties", {"rescale": "l1"}), ("sce", {"select_topk": 0.2})],
)
def test_memory_is_bounded_and_does_not_grow_with_the_models(
    tmp_path: Path, method: str, options: dict[str, Any]
) -> None:
    budget, size = 8 * 2**20, 24 * 2**20  # large beside the kernel's own count, which moves by 1 MiB
    values = torch.randn(6, size // 4, generator=torch.Generator().manual_seed(0))
    folders = [write(tmp_path / f"m{number}", {"w": row.view(-1, 512)}) for number, row in enumerate(values)]
    small = write(tmp_path / "small", {"w": torch.ones(2)})
    program = (
        "import json, sys\n"
        "import torch\n"
        "from benchmarks.harness import peak_memory, reset_peak_memory\n"
        "from lit_core.merging import merge_folders\n"
        "torch.set_num_threads(1)\n"
        "folders, small, out, method, options, budget = json.loads(sys.argv[1])\n"
        "merge_folders([small], out, method, base=small, **options)\n"  # loads libraries
        "before = reset_peak_memory()\n"
        "peaks = []\n"
        "for count in (2, 5):\n"
        "    merge_folders(folders[:count], f'{out}{count}', method, base=folders[-1], chunk_bytes=budget, **options)\n"
        "    peaks.append(peak_memory() - before)\n"
        "print(json.dumps(peaks))\n"
    )
    root = Path(__file__).parents[3]
    arguments = json.dumps([list(map(str, folders)), str(small), str(tmp_path / "out"), method, options, budget])
    call = [sys.executable, "-c", program, arguments]
    environment = {**os.environ, "PYTHONPATH": str(root), "MALLOC_MMAP_THRESHOLD_": "131072"}  # what is freed is gone
    done = subprocess.run(call, env=environment, capture_output=True, text=True, check=True)
    peaks = [peak * 2**20 for peak in json.loads(done.stdout)]
    assert max(peaks) < 1.5 * budget  # a tensor has 24 MiB
    assert peaks[-1] - peaks[0] < 0.25 * budget  # of two models and of five


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"a.norm": torch.ones(8)}, r"tensor 'a.norm' has the shapes \(7,\) and \(8,\)"),
        ({"a.norm": torch.ones(7, dtype=torch.int32)}, "tensor 'a.norm' has the types torch.float32 and torch.int32$"),
        ({"ids": torch.zeros(9, dtype=torch.int64)}, r"'ids' holds whole numbers \(torch.int64\) that are not equal"),
        ({"more": torch.ones(1)}, "m1 has a tensor 'more' that the others lack"),
        ({"a.norm": None}, "m1 has no tensor 'a.norm'"),
        ({"a.norm": torch.full((7,), torch.nan)}, "tensor 'a.norm' has values that are not finite"),
    ],
)
def test_models_that_do_not_fit(tmp_path: Path, change: dict[str, Any], told: str) -> None:
    state = {name: tensor for name, tensor in {**tensors(1), **change}.items() if tensor is not None}
    folders = [write(tmp_path / "m0", tensors(0)), write(tmp_path / "m1", state)]
    with pytest.raises(InputError, match=told):
        merge_folders(folders, tmp_path / "out", "linear")
    assert {path.name for path in tmp_path.iterdir()} == {"m0", "m1"}


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ({"config.json": {"num_attention_heads": 4}}, "field 'num_attention_heads': is 4, but 2 in"),
        ({"tokenizer.json": {"model": {"vocab": {"a": 1, "b": 0}}}}, "tokenizer.json: token 0 is 'b', but 'a' in"),
        ({"tokenizer.json": {"model": {"vocab": [["a", -1.0], ["c", -2.0]]}}}, "token 1 is 'c', but 'b' in"),
        ({"tokenizer.json": {"model": {"vocab": {"a": 0}}, "added_tokens": [{"id": 2, "content": "<y>"}]}},
         "token 2 is '<y>', but '<x>' in"),
    ],
)  # fmt: skip
def test_architectures_and_tokenizers_that_differ(tmp_path: Path, files: dict[str, Any], told: str) -> None:
    heads = {"num_attention_heads": 2}
    one, two = (write(tmp_path / name, {"w": torch.ones(2)}, heads) for name in ("one", "two"))
    added = [{"id": 2, "content": "<x>"}]
    (one / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": added}))
    merge_folders([one, two], tmp_path / "fits", "linear")
    for name, content in files.items():
        (two / name).write_text(json.dumps({"model_type": "numbers", **content}))
    with pytest.raises(InputError, match=told):
        merge_folders([one, two], tmp_path / "out", "linear")


def header(dtype: str, shape: list[int] | None, data: bytes = b"\0" * 8) -> bytes:
    """A file with one tensor of eight bytes."""
    text = json.dumps({"w": {"dtype": dtype, "shape": shape, "data_offsets": [0, 8]}}).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "does not start with the header"),
        (b"version https://git-lfs.github.com/spec/v1\n", "does not start with the header"),
        (header("F32", [2], b""), "ends before the end of tensor 'w'"),
        (header("F32", [3]), "'w' has 8 bytes, but 12 for its shape"),
        (header("F32", [-2]), "'w' has 8 bytes, but -8 for its shape"),
        (header("F4", [2]), "'w' has the type F4, which is not known"),
        (header("F32", None), "cannot be read"),
        ((12).to_bytes(8, "little") + b"{not json...", "cannot be read"),
    ],
)  # fmt: skip
def test_files_that_are_broken(tmp_path: Path, content: bytes, told: str) -> None:
    folder = write(tmp_path / "m", {"w": torch.ones(2)})
    (folder / WEIGHTS).write_bytes(content)
    with pytest.raises(InputError, match=rf"m/model\.safetensors: .*{told}"):
        merge_folders([folder], tmp_path / "out", "linear")


def modules(paths: Sequence[str]) -> str:
    return json.dumps([{"idx": n, "name": str(n), "path": path, "type": "x"} for n, path in enumerate(paths)])


def sentence_folder(folder: Path, seed: int, pooling: str = "mean") -> Path:
    write(folder, {"w": tensors(seed)["b.embed"]})
    (folder / "modules.json").write_text(modules(["", "1_Pooling", "2_Dense", "3_Normalize"]))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": pooling}))
    (folder / "3_Normalize").mkdir()
    write(folder / "2_Dense", {"linear.weight": tensors(seed)["a.norm"]})
    return folder


def test_modules_of_sentence_transformers(tmp_path: Path) -> None:
    folders = [sentence_folder(tmp_path / f"m{seed}", seed) for seed in range(2)]
    merge_folders(folders, tmp_path / "out", "linear", [1, 3])
    for part, name, key in (("", "w", "b.embed"), ("2_Dense", "linear.weight", "a.norm")):
        expected = merge([{"x": tensors(seed)[key]} for seed in range(2)], "linear", [1, 3])["x"]
        found = load_file(tmp_path / "out" / part / WEIGHTS)
        assert found.keys() == {name}
        assert torch.equal(found[name], expected)
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text()) == {"pooling_mode": "mean"}
    assert (tmp_path / "out" / "3_Normalize").is_dir()
    with pytest.raises(InputError, match=r"1_Pooling/config\.json: is not as .*m0/1_Pooling/config\.json"):
        merge_folders([folders[0], sentence_folder(tmp_path / "m2", 2, "cls")], tmp_path / "no", "linear")
    (folders[1] / "2_Dense" / WEIGHTS).rename(folders[1] / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"m1/2_Dense: has neither model\.safetensors nor"):
        merge_folders(folders, tmp_path / "no", "linear")
    (folders[0] / "modules.json").write_text(modules(["", "../m1"]))
    with pytest.raises(InputError, match=r"modules\.json: names a folder outside"):
        merge_folders(folders, tmp_path / "no", "linear")


def test_files_are_those_of_a_base_that_has_the_modules(tmp_path: Path) -> None:
    members = [write(tmp_path / f"m{seed}", {"w": tensors(seed)["b.embed"]}) for seed in range(2)]
    for member in members:
        (member / "1_Pooling").mkdir()
        (member / "modules.json").write_text(modules(["", "1_Pooling"]))
    plain = write(tmp_path / "plain", {"w": tensors(5)["b.embed"]})
    merge_folders(members, tmp_path / "out", "task_arithmetic", base=plain)
    assert (tmp_path / "out" / "modules.json").is_file()
    merge_folders([plain], tmp_path / "other", "task_arithmetic", base=members[0])
    assert not (tmp_path / "other" / "modules.json").exists()
