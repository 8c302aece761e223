"""One way in for every experiment: ``python -m experiments.<name> [verb] [flags]``.

Nothing heavy is imported here: help and the list of experiments answer at once.
"""

import argparse
import importlib
import logging
import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lit_core.errors import InputError

TRAINER_VERBS = ("fit", "validate", "test", "predict")
SCALES = ("smoke", "tiny", "paper")


@dataclass(frozen=True)
class Verb:
    """A verb that only one experiment has.

    Args:
        call: ``module:function`` that takes the arguments after the verb, a list of strings.
        usage: Lines for help: flags, and what it does.
    """

    call: str
    usage: str


@dataclass(frozen=True)
class Spec:
    """What the command line knows of an experiment before anything heavy is imported.

    Args:
        name: Name of the experiment and of its folder below the runs.
        summary: One line for lists and help.
        folder: Holds ``paper.yaml``, ``tiny.yaml``, ``smoke.yaml`` and ``<scale>.<stage>.yaml`` for stages.
        method: ``module:Class`` of the LightningModule.
        data: ``module:Class`` of the DataModule.
        arms: ``module:function`` that builds the reproduction from a :class:`lit_core.setting.Setting`.
        stages: Names of the fits that make up the method, in order; each but the first starts from the folder that the
            one before has exported. Empty for a method of one fit.
        callbacks: ``module:Class`` of callbacks that the runs of the trainer's verbs have, those of a reproduction
            excepted, which has a report of its own; each is built with the run's folder.
        recorders: The same for all runs.
        aliases: Other names of flags, as papers call the same thing by several.
        verbs: Further verbs by name.
        seeds: Seeds of a reproduction, where the user names none.
    """

    name: str
    summary: str
    folder: Path
    method: str
    data: str
    arms: str
    stages: tuple[str, ...] = ()
    callbacks: tuple[str, ...] = ()
    recorders: tuple[str, ...] = ()
    aliases: Mapping[str, str] = field(default_factory=dict)
    verbs: Mapping[str, Verb] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0, 1, 2)

    def configs(self, scale: str, stage: str | None = None) -> list[Path]:
        """Configuration files of a scale and stage, to be laid over one another in this order."""
        scales = SCALES[SCALES.index(scale) :][::-1]  # the paper's values first, smaller ones over them
        names = [name for s in scales for name in ((s,) if stage is None else (s, f"{s}.{stage}"))]
        paths = [self.folder / f"{name}.yaml" for name in names]
        return [path for path in paths if path.is_file()]


def load(path: str) -> Any:
    """Import ``module:name``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def main(spec: Spec, args: Sequence[str] | None = None) -> int:
    """Run an experiment's command line.

    Args:
        spec: The experiment.
        args: Arguments without the program's name; by default those of this process.

    Returns:
        Exit code: 0, or 2 after one line about a mistake in the input.
    """
    args = list(sys.argv[1:] if args is None else args)
    if args[:1] and args[0] in ("-h", "--help"):
        print(_help(spec))
        return 0
    verb = args.pop(0) if args and not args[0].startswith("-") else "reproduce"
    names = [arg.partition("=") for arg in args]
    args = [spec.aliases.get(name, name) + equals + value for name, equals, value in names]
    quieten()
    return guarded(lambda: _verb(spec, verb, args))


def guarded(action: Callable[[], None]) -> int:
    """Run ``action``; turn an error of the user's into one line and exit code 2."""
    try:
        action()
    except InputError as error:
        return _refuse(str(error))
    except Exception as error:
        if type(error).__name__ == "MisconfigurationException":  # lightning's word for flags that do not fit
            return _refuse(str(error))
        cause = error.__cause__ or error.__context__
        if isinstance(cause, InputError):  # wrapped by a loader worker or a launcher
            return _refuse(str(cause))
        raise
    return 0


def _verb(spec: Spec, verb: str, args: list[str]) -> None:
    if verb == "reproduce":
        from lit_core.setting import reproduce

        options, forwarded = _reproduce_parser(spec).parse_known_args(args)
        reproduce(spec, options, _check_forwarded(forwarded))
    elif verb == "export":
        from lit_core.stages import export

        export(spec, _export_parser(spec).parse_args(args))
    elif verb in TRAINER_VERBS:
        from lit_core.stages import run_verb

        scale, rest = take(args, "--scale", "tiny")
        if scale not in SCALES:
            raise InputError(f"--scale takes {', '.join(SCALES)}, got '{scale}'")
        stage, rest = take(rest, "--stage", None)
        if stage is not None and stage not in spec.stages:
            raise InputError(f"--stage takes {', '.join(spec.stages) or 'nothing here'}, got '{stage}'")
        run_verb(spec, verb, rest, scale or "tiny", stage)
    elif verb in spec.verbs:
        load(spec.verbs[verb].call)(args)
    else:
        verbs = ", ".join(("reproduce", *TRAINER_VERBS, "export", *spec.verbs))
        raise InputError(f"unknown verb '{verb}'; use one of {verbs}")


class Parser(argparse.ArgumentParser):
    """A parser whose complaints are one line, as all are."""

    def error(self, message: str) -> Any:
        """Raise instead of leaving the process."""
        raise InputError(message)


def _reproduce_parser(spec: Spec) -> argparse.ArgumentParser:
    parser = Parser(
        f"python -m experiments.{spec.name} reproduce", description=spec.summary, allow_abbrev=False,
        epilog="--model.*, --data.* and --trainer.* are handed to every fit.",
    )  # fmt: skip
    parser.add_argument("--arms", nargs="+", default=["main"], help="main (default), all, or names of arms")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(spec.seeds),
                        help=f"seeds of every arm (default {' '.join(map(str, spec.seeds))})")  # fmt: skip
    parser.add_argument("--scale", choices=SCALES, default="tiny", help="seconds, minutes (default), the paper's own")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs"), help="where all runs go (default runs)")
    parser.add_argument("--jobs", type=int, help="runs at a time (default: what suits the experiment and this machine)")
    parser.add_argument("--fresh", action="store_true", help="delete what these arms and seeds left, begin anew")
    return parser


def _export_parser(spec: Spec) -> argparse.ArgumentParser:
    parser = Parser(f"python -m experiments.{spec.name} export", allow_abbrev=False)
    parser.add_argument("--ckpt_path", type=Path, help="checkpoint, a file or the folder of a sharded one")
    parser.add_argument("--backbone", help="instead of a checkpoint: preset, folder or hub id, untrained")
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--form", choices=("merged", "adapter"), default="merged", help="whole weights or the adapter")
    return parser


def _check_forwarded(args: list[str]) -> list[str]:
    for arg in args:
        if arg.startswith("-") and not arg.startswith(("--model.", "--data.", "--trainer.")) and not _is_number(arg):
            raise InputError(f"unknown flag '{arg}'; reproduce takes --arms --seeds --scale --runs_dir --jobs --fresh, "
                             "and --model.*, --data.*, --trainer.* for every fit")  # fmt: skip
    return args


def _is_number(arg: str) -> bool:
    try:
        float(arg)
    except ValueError:
        return False
    return True


def take(args: list[str], flag: str, default: str | None) -> tuple[str | None, list[str]]:
    """Take ``--flag value`` or ``--flag=value`` out of a list of arguments."""
    for at, arg in enumerate(args):
        if arg == flag:
            if at + 1 == len(args):
                raise InputError(f"{flag} needs a value")
            return args[at + 1], args[:at] + args[at + 2 :]
        if arg.startswith(f"{flag}="):
            return arg.partition("=")[2], args[:at] + args[at + 1 :]
    return default, args


def _refuse(message: str) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return 2


def quieten() -> None:
    """Leave out library chatter that says nothing about the user's run."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")  # lightning 2.6 calls what jsonargparse 5 drops
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # an optional CPU kernel that it does without
    chatter = ("does not have many workers", "Checkpoint directory .* exists", "dirpath has changed", "LeafSpec",
               "smaller than the logging interval", "custom batch sampler .* for prediction",
               "ModelCheckpoint with manual optimization",
               "args parameter is intended to run from within Python")  # fmt: skip
    for text in chatter:
        warnings.filterwarnings("ignore", message=f".*{text}.*")


def _help(spec: Spec) -> str:
    more = "".join(f"\n  {name} {verb.usage}" for name, verb in spec.verbs.items())
    stages = f"\n  fit --stage NAME       one stage alone: {', '.join(spec.stages)}" if spec.stages else ""
    return f"""{spec.summary}

usage: python -m experiments.{spec.name} [verb] [flags]

  reproduce (default)    the method against its baselines: tables, plots, claims
    --arms main|all|NAMES  --seeds 0 1 2  --scale smoke|tiny|paper  --runs_dir DIR  --jobs N  --fresh
  fit                    train, then evaluate on the test split{stages}
  validate | test | predict
                         evaluate, or write vectors or responses; --ckpt_path FILE for a trained model
  export --ckpt_path FILE --output DIR [--form merged|adapter]{more}

flags of fit, validate, test, predict (see `fit --help` for all):
  --model.backbone ID    preset (tiny-qwen3, nano-qwen3, tiny-llama, tiny-bert, tiny-qwen2-vl), local folder, or hub id
  --model.lora.r 16      adapters        --model.quantization nf4|int8
  --data.path PATH       the built-in data, a folder, a JSONL file, or a Hugging Face dataset id
  --trainer.max_steps N  --trainer.devices N  --trainer.strategy ddp
  --scale smoke|tiny|paper  --config FILE  --print_config  --ckpt_path FILE|last"""
