"""The command that merges folders, in process, and in a process that is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.boom.__main__ import main
from experiments.boom.merge_command import METHODS as LISTED
from experiments.boom.merge_command import method_options
from lit_core.merging import METHODS, drift, merge
from lit_core.merging.adapter_folder import ADAPTER, CONFIG
from lit_core.merging.model_folder import INDEX, WEIGHTS

ROOT = Path(__file__).parents[2]
MODULE = "base_model.model.q"


def state(seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(4, 6, generator=generator).to(dtype) for name in ("h.0.w", "h.1.w")}


def write(folder: Path, tensors: Mapping[str, Tensor], **config: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "numbers", **config}))
    save_file(dict(tensors), folder / WEIGHTS)
    return folder


def adapter(folder: Path, rank: int) -> Path:
    folder.mkdir()
    generator = torch.Generator().manual_seed(rank)
    shapes = {f"{MODULE}.lora_A.weight": (rank, 5), f"{MODULE}.lora_B.weight": (4, rank)}
    save_file({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}, folder / ADAPTER)
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": ["q"],
              "base_model_name_or_path": "some/base"}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps(config))
    return folder


def product(folder: Path) -> Tensor:
    tensors = load_file(folder / ADAPTER)
    return tensors[f"{MODULE}.lora_B.weight"] @ tensors[f"{MODULE}.lora_A.weight"]


def said(capsys: pytest.CaptureFixture[str], *args: object) -> list[str]:
    assert main(["merge", *map(str, args)]) == 0
    return capsys.readouterr().out.splitlines()


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    assert main(["merge", *map(str, args)]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("error: ")
    assert not captured.out
    return line


def test_folders_are_merged_as_state_dicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, state(seed)) for seed, name in enumerate("abc")]
    base = write(tmp_path / "base", state(9))
    states = [state(seed) for seed in range(3)]
    out = tmp_path / "deep" / "out"
    (line,) = said(capsys, "--models", *folders, "--method", "multislerp", "--output", out, "--weights", 1, 2, 3)
    assert line == f"merged 3 models by multislerp: {out} ({out}/merge.json says how)"
    torch.testing.assert_close(load_file(out / WEIGHTS), merge(states, "multislerp", [1, 2, 3]), rtol=0, atol=0)
    given = ["--base", base, "--density", "0.2", "--consensus=count", "--normalize", "false", "--shard_bytes", 60]
    said(capsys, "--models", *folders, *given, "--method", "ties", "--dtype", "bfloat16", "--output", tmp_path / "ties")
    index = json.loads((tmp_path / "ties" / INDEX).read_text())
    found = {name: load_file(tmp_path / "ties" / file)[name] for name, file in index["weight_map"].items()}
    options = {"density": 0.2, "consensus": "count", "normalize": False}
    expected = merge(states, "ties", base=state(9), dtype="bfloat16", **options)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    manifest = json.loads((tmp_path / "ties" / "merge.json").read_text())
    assert manifest["options"] == {**options, "lam": 1.0}


def test_adapters_are_merged_exactly_or_to_a_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [adapter(tmp_path / name, rank) for name, rank in (("a", 1), ("b", 2))]
    exact = 2 * (0.25 * product(folders[0]) + 0.75 * product(folders[1]))
    common = ("--models", *folders, "--method", "linear", "--weights", 1, 3)
    (line,) = said(capsys, *common, "--output", tmp_path / "cat")
    assert line.startswith("merged 2 adapters by linear: ")
    torch.testing.assert_close(product(tmp_path / "cat"), exact)
    said(capsys, *common, "--output", tmp_path / "svd", "--rank", 1, "--base", "other/base")
    left, values, right = torch.linalg.svd(exact)
    torch.testing.assert_close(product(tmp_path / "svd"), values[0] * torch.outer(left[:, 0], right[0]))
    config = json.loads((tmp_path / "svd" / CONFIG).read_text())
    assert (config["r"], config["base_model_name_or_path"]) == (1, "other/base")


def test_drift_is_printed_and_written_beside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [write(tmp_path / name, state(seed)) for seed, name in enumerate("ab")]
    base = write(tmp_path / "base", state(9))
    out = tmp_path / "out"
    given = ("--models", *folders, "--base", base, "--method", "model_stock", "--output", out, "--drift")
    lines = said(capsys, *given)
    found = json.loads((tmp_path / "out.drift" / "drift.json").read_text())
    report = drift(folders, base)
    assert found == {"model": report.rows("model"), "layers": report.rows("layer")}
    assert (tmp_path / "out.drift" / "drift.png").read_bytes().startswith(b"\x89PNG")
    (row,) = [line for line in lines if "h.1" in line]
    for value in (*found["layers"][1]["ratios"].values(), *found["layers"][1]["cosines"].values()):
        assert f"{value:.3g}" in row or f"{value:.3f}" in row
    assert "merge.json says how" in lines[-1]
    assert "exists and is not empty" in refused(capsys, *given)
    assert "'drift': compares whole models with their base" in refused(
        capsys, "--models", *folders, "--method", "linear", "--output", tmp_path / "no", "--drift"
    )


def test_zero_tensors_are_told_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", {**state(0), "bias": torch.zeros(3)})
    two = write(tmp_path / "two", {**state(1), "bias": torch.ones(3)})
    given = ("--models", one, two, "--method", "multislerp")
    (line,) = said(capsys, *given, "--output", tmp_path / "out")
    assert line.endswith("/merge.json says how; it has notes on 1 tensor)")
    notes = json.loads((tmp_path / "out" / "merge.json").read_text())["notes"]
    assert notes == {"bias": ["is zero in models [0] (from 0): they count in the mean length alone"]}
    assert load_file(tmp_path / "out" / WEIGHTS)["bias"].tolist() == pytest.approx([0.5] * 3)  # here the linear mean
    line = refused(capsys, *given, "--output", tmp_path / "no", "--on_zero", "error")
    assert "'on_zero': tensor 'bias': is zero in models [0] (from 0), and so has no direction" in line
    assert not (tmp_path / "no").exists()


def test_models_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = write(tmp_path / "one", state(0))
    out = tmp_path / "out"
    others = {
        "of another kind": (write(tmp_path / "llama", {"x": torch.ones(1)}, model_type="llama"),
                            "llama/config.json: field 'model_type': is llama, but numbers in"),
        "missing": (write(tmp_path / "less", {"h.0.w": state(1)["h.0.w"]}), "less has no tensor 'h.1.w'"),
        "extra": (write(tmp_path / "more", {**state(1), "h.2.w": torch.ones(1)}), "more has a tensor 'h.2.w' that"),
        "shape": (write(tmp_path / "wide", {**state(1), "h.1.w": torch.ones(5)}), "'h.1.w' has the shapes (4, 6) and"),
        "type": (write(tmp_path / "half", state(1, torch.bfloat16)), "torch.bfloat16; name the dtype of the result"),
        "adapter": (adapter(tmp_path / "lora", 2), "lora: is an adapter, but"),
        "nowhere": (tmp_path / "nowhere", "nowhere: there is no such folder"),
        "empty": (tmp_path, "is no model folder: it has no config.json"),
        "broken": (write(tmp_path / "broken", state(1)), "broken/model.safetensors: cannot be read"),
    }  # fmt: skip
    (tmp_path / "broken" / WEIGHTS).write_bytes(b"nonsense")
    before = sorted(tmp_path.iterdir())
    for name, (folder, told) in others.items():
        for order in (
            ((one, folder), (folder, one)) if name in ("adapter", "nowhere", "empty", "broken") else ((one, folder),)
        ):
            line = refused(capsys, "--models", *order, "--method", "linear", "--output", out)
            assert told in line, name
    assert sorted(tmp_path.iterdir()) == before
    line = refused(capsys, "--models", one, "--base", tmp_path / "gone", "--method", "ties", "--output", out)
    assert "gone: there is no such folder" in line


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--method", "soup"], "field 'method': must be one of linear, slerp, multislerp, karcher, "),
        (["--method", "linear", "--weights", "1"], "field 'weights': need a finite number for each of 2 models, got"),
        (["--method", "linear", "--weights", "1", "-1"], "divides by the sum of the weights, which is 0"),
        (["--method", "linear", "--weights", "1", "x"], "argument --weights: invalid float value: 'x'"),
        (["--method", "ties"], "field 'base': ties needs the base"),
        (["--method", "linear", "--density", "0.2"], "field 'density': linear does not know this option"),
        (["--method", "multislerp", "--tangent", "exact"], "field 'tangent': must be one of projection, log, karcher"),
        (["--method", "multislerp", "--space", "delta"], "field 'base': space 'delta' needs the base"),
        (["--method", "slerp", "--t"], "--t needs a value"),
        (["--method", "slerp", "-t", "1"], "'-t' is no flag"),
        (["--method", "linear", "--dtype", "int8"], "field 'dtype': must be a floating type"),
        (["--method", "linear", "--shard_bytes", "0"], "field 'shard_bytes': must be at least 1, got 0"),
        (["--method", "linear", "--shard_bytes", "5GB"], "argument --shard_bytes: invalid int value: '5GB'"),
        (["--method", "linear", "--rank", "3"], "field 'rank': is for adapters only"),
        ([], "the following arguments are required: --method"),
    ],
)
def test_wrong_flags(tmp_path: Path, capsys: pytest.CaptureFixture[str], args: list[str], told: str) -> None:
    folders = [write(tmp_path / name, state(seed)) for seed, name in enumerate("ab")]
    assert told in refused(capsys, "--models", *folders, "--output", tmp_path / "out", *args)
    assert not (tmp_path / "out").exists()


def test_outputs_and_adapters_that_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (adapter(tmp_path / name, 2) for name in ("one", "two"))
    given = ("--models", one, two, "--method", "linear", "--output")
    assert f"{two}: the output folder exists and is not empty; name another" in refused(capsys, *given, two)
    (tmp_path / "file").write_text("")
    assert "cannot be read or written (Not a directory)" in refused(capsys, *given, tmp_path / "file" / "out")
    assert "'dtype': is for whole models only" in refused(capsys, *given, tmp_path / "out", "--dtype", "float16")
    line = refused(capsys, "--models", one, two, "--method", "ties", "--output", tmp_path / "out", "--base", "x")
    assert "field 'method': ties is no sum of updates" in line
    assert "'drift': compares whole models" in refused(capsys, *given, tmp_path / "out", "--base", "x", "--drift")


def test_help_names_every_method_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {line.split()[0]: line for line in LISTED.splitlines()[1:]}
    assert list(rows) == list(METHODS)
    for name, method in METHODS.items():
        row = rows["dare_linear"] if name == "dare_ties" else rows[name]
        named = {word.removeprefix("--") for word in row.split() if word.startswith("--")}
        assert named == {field.name for field in fields(method)}, name
        assert ("needs a base" in row) == method.needs_base
    with pytest.raises(SystemExit) as stop:
        main(["merge", "--help"])
    assert stop.value.code == 0
    assert "multislerp" in capsys.readouterr().out
    assert main(["--help"]) == 0
    assert "merge --models A B C --method multislerp --output DIR" in capsys.readouterr().out
    assert main(["melt"]) == 2
    assert "unknown verb 'melt'; use one of reproduce, fit, validate, test, predict, export, merge" in (
        capsys.readouterr().err
    )


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom experiments.boom.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\nexcept SystemExit:\n    pass\n"
        "assert not {'torch', 'lightning', 'transformers', 'numpy'} & sys.modules.keys()\n"
    )
    for args in (["--help"], ["merge", "--help"]):
        subprocess.run([sys.executable, "-c", program, *args], cwd=ROOT, check=True, capture_output=True)


def test_values_of_options() -> None:
    found = method_options(["--density", "0.2", "--seed=3", "--normalize", "false", "--tangent", "log", "--t", "-1"])
    assert found == {"density": 0.2, "seed": 3, "normalize": False, "tangent": "log", "t": -1}
    assert {name: type(value) for name, value in found.items()} == {
        "density": float, "seed": int, "normalize": bool, "tangent": str, "t": int}  # fmt: skip


@pytest.mark.slow
def test_a_merge_that_is_killed_while_it_writes_leaves_nothing_by_its_name(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    members = [{f"w{n}": torch.randn(512, 512, generator=generator) for n in range(40)} for _ in range(2)]
    folders = [write(tmp_path / f"m{number}", tensors) for number, tensors in enumerate(members)]
    out = tmp_path / "out"
    arguments = ["--models", *map(str, folders), "--method", "linear", "--output", str(out), "--chunk_bytes", "2000"]
    command = [sys.executable, "-m", "experiments.boom", "merge", *arguments]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.DEVNULL)
    partial = tmp_path / ".out.tmp" / WEIGHTS
    deadline = time.monotonic() + 120
    while not (partial.is_file() and partial.stat().st_size > 2**16) and time.monotonic() < deadline:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    written = sum(tensor.nbytes for tensor in members[0].values())
    assert 2**16 < partial.stat().st_size < written  # it was in the middle
    assert not out.exists()
    assert main(["merge", *arguments[:-1], str(2**24)]) == 0
    torch.testing.assert_close(load_file(out / WEIGHTS), merge(members, "linear"), rtol=0, atol=0)
    assert not list(tmp_path.glob(".*"))
