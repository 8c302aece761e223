"""Every command of the README that starts an experiment runs, in order, at the smallest scale."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"
COMMAND = re.compile(r"python -m (experiments(?:\.\w+)?)(.*)")
POLICIES = ("sft", "grpo", "ppo", "tre", "reward_model")
QUICK = ["--scale", "smoke", "--trainer.enable_progress_bar=false"]
SMALL = [*QUICK, "--data.world.documents=120"]
SMALL += [f"--data.world.{split}_questions={count}" for split, count in (("train", 100), ("dev", 10), ("test", 12))]


def commands() -> list[tuple[str, list[str]]]:
    blocks = re.findall(r"```bash\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.DOTALL)
    found = [COMMAND.search(line) for block in blocks for line in block.splitlines()]
    return [(match[1], shlex.split(match[2])) for match in found if match]


@pytest.mark.slow
def test_every_command_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIT_CACHE", str(tmp_path / "cache"))
    seen = commands()
    assert len(seen) >= 9
    for module, args in seen:
        needs_data = not args or args[0] in ("fit", "test", "predict", "validate")
        if module == "experiments" or "--help" in args or not needs_data:
            more: list[str] = []
        else:
            more = QUICK if module.rpartition(".")[2] in POLICIES else SMALL
            more = more if args else [*more, "--seeds", "0", "--jobs", "1"]  # a process of its own takes long to start
        if module == "experiments":
            monkeypatch.setattr("sys.argv", ["experiments"])
            assert importlib.import_module("experiments.__main__").main() == 0
        else:
            assert importlib.import_module(f"{module}.__main__").main([*args, *more]) == 0, args
    capsys.readouterr()
