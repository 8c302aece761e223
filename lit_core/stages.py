"""The verbs behind the command line: fits in stages, evaluation, export, reproduction; imports lightning."""

import argparse
import logging
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only

from lit_core.callbacks.checkpoints import AtomicCheckpoints, Checkpoints
from lit_core.callbacks.curves import CurveRecorder
from lit_core.callbacks.final_checkpoint import FinalCheckpoint
from lit_core.callbacks.step_seed import StepSeed
from lit_core.callbacks.throughput import Throughput
from lit_core.cli import Spec, load, take
from lit_core.errors import InputError
from lit_core.files import write_text
from lit_core.module import check_method

FOLDER_VARIABLE = "LIT_RUN_FOLDER"  # tells processes that a strategy starts where the first one writes


class Parser(LightningArgumentParser):
    """Says what is wrong in one line instead of printing the whole usage."""

    def error(self, message: str, ex: Exception | None = None) -> Any:
        raise InputError(re.sub(r"\s+", " ", str(ex or message)))


class FolderConfig(SaveConfigCallback):
    """Writes ``config.yaml`` into the run's folder.

    Args:
        parser: Parser of the verb.
        config: What it has parsed.
        folder: The run's folder.
    """

    def __init__(self, parser: LightningArgumentParser, config: Any, folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.folder = folder

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            write_text(self.folder / "config.yaml", self.parser.dump(self.config, skip_none=False, format="yaml"))


class ExperimentCLI(LightningCLI):
    """LightningCLI whose run writes everything into one folder.

    Args:
        spec: The experiment.
        args: Verb and flags.
        configs: Configuration files under the flags, the complete one first.
        folder: Where the run writes.
        quiet: No notes, summary or report of its own: a part of something larger.
        execute: False only parses and builds.
    """

    def __init__(
        self,
        spec: Spec,
        args: Sequence[str],
        configs: Sequence[Path],
        folder: Path,
        quiet: bool = False,
        execute: bool = True,
    ) -> None:
        folder = folder.absolute()  # loggers write from threads of their own, whatever the working directory is by then
        self.spec, self.folder, self.quiet, self.execute, self.verb = spec, folder, quiet, execute, args[0]
        overlays = [part for path in configs[1:] for part in ("--config", str(path))]
        complete = {"default_config_files": [str(path) for path in configs[:1]]}
        for name in ("lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).setLevel(logging.WARNING if quiet else logging.INFO)
        super().__init__(
            load(spec.method),
            load(spec.data),
            args=[args[0], *overlays, *args[1:]],
            parser_class=Parser,
            parser_kwargs={self.verb: complete},
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=FolderConfig,
            save_config_kwargs={"folder": folder},
            trainer_defaults={
                "use_distributed_sampler": False,  # our samplers shard by rank themselves
                "num_sanity_val_steps": 0,  # a part of a corpus cannot be evaluated
                "log_every_n_steps": 10,
            },
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # lightning asks the object, not the class
        return {self.verb: LightningCLI.subcommands()[self.verb]}  # the parsers of the other verbs take long to build

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(Checkpoints, "checkpoint")
        parser.set_defaults(
            {
                "checkpoint.save_last": True,
                "checkpoint.save_top_k": 0,
                "checkpoint.every_n_train_steps": 100,
                "checkpoint.enable_version_counter": False,  # last.ckpt is always the last one
            }
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.loading.seed", compute_fn=int)

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Refuse flags that a checkpoint's own hyperparameters would silently beat."""
        flags = [arg for arg in args if arg.startswith("--model.")]
        if flags and any(arg.startswith("--ckpt_path") for arg in args):
            raise InputError(f"--ckpt_path brings the model's settings along: leave out {flags[0].partition('=')[0]}")
        super().parse_arguments(parser, args)
        settings = self.config[self.config["subcommand"]]
        checkpoint = settings.get("ckpt_path")
        if checkpoint and checkpoint not in ("last", "best"):
            check_method(read_metadata(Path(checkpoint)), load(self.spec.method).__name__, checkpoint)
        _check_devices(settings["trainer"])
        _check_precision(settings["trainer"])

    def _parse_ckpt_path(self) -> None:
        """Take the model's settings from a sharded checkpoint too, which is a folder: lightning reads files alone."""
        subcommand = self.config.get("subcommand")
        checkpoint = Path(self.config[subcommand].get("ckpt_path") or "")
        if not (checkpoint / "meta.pt").is_file():
            super()._parse_ckpt_path()
            return
        settings = read_metadata(checkpoint).get("hyper_parameters", {})
        settings = {name: value for name, value in settings.items() if name != "_instantiator"}
        self.config = self.parser.parse_object({subcommand: {"model": settings}}, self.config)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        settings = self.config_init[self.subcommand]
        settings["checkpoint"].dirpath = str(self.folder)
        callbacks = [
            StepSeed(int(settings["seed_everything"])),
            CurveRecorder(self.folder, settings["trainer"]["log_every_n_steps"] or 10),
        ]
        paths = (*self.spec.recorders, *(() if self.quiet else self.spec.callbacks))
        callbacks += [load(path)(self.folder) for path in paths]
        self.throughput = Throughput()  # in evaluation too: a checkpoint asks for the callbacks that it was made with
        callbacks += [self.throughput, FinalCheckpoint(self.folder)]
        trainer = settings["trainer"]
        if trainer["logger"] in (None, True) and not trainer["fast_dev_run"]:
            kwargs["logger"] = TensorBoardLogger(self.folder, name="", version="tensorboard")
            callbacks.append(LearningRateMonitor("step"))
        if self.quiet:
            kwargs["enable_model_summary"] = False
        kwargs["default_root_dir"] = self.folder
        plugins = trainer["plugins"] or []
        kwargs["plugins"] = [*(plugins if isinstance(plugins, list) else [plugins]), AtomicCheckpoints()]
        kwargs["callbacks"] = [*(trainer["callbacks"] or []), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def _run_subcommand(self, subcommand: str) -> None:
        if self.execute:
            super()._run_subcommand(subcommand)

    def validate(self, **kwargs: Any) -> None:
        """Without lightning's own table, which repeats every metric for every loader."""
        self.trainer.validate(**{**kwargs, "verbose": False})

    def test(self, **kwargs: Any) -> None:
        """As :meth:`validate`."""
        self.trainer.test(**{**kwargs, "verbose": False})

    def before_fit(self) -> None:
        """Read what the test will need, so that a mistake in it is told before the training and not after it."""
        self.datamodule.setup("test")


def run_verb(spec: Spec, verb: str, args: list[str], scale: str, stage: str | None) -> None:
    """Run a trainer verb; ``fit`` of a method in stages runs them all, each from the export of the one before."""
    only_asks = any(arg in ("-h", "--help") or arg.startswith("--print_config") for arg in args)
    checkpoint, others = take(args, "--ckpt_path", None)
    resumes = checkpoint is not None
    if spec.stages and stage is None:
        stage, _ = take(args, "--model.stage", None)
    if verb == "fit" and spec.stages and stage is None and not only_asks and checkpoint in (None, "last"):
        _fit_in_stages(spec, others, scale, resumes)
        return
    folder = run_folder(spec, verb, args, resumes)
    stage = stage or (_stage_of_checkpoint(spec, args) if resumes else None) or (spec.stages or (None,))[-1]
    here = folder / stage if stage and verb == "fit" else folder
    if verb == "fit" and not resumes and not only_asks:
        _refuse_earlier_run(here)
    cli = ExperimentCLI(spec, [verb, *_with_last(args, here)], spec.configs(scale, stage), here)
    if verb == "fit":
        _test(cli)
    rank_zero_info(f"everything of this run is in {here}")


def _fit_in_stages(spec: Spec, args: list[str], scale: str, resumes: bool) -> None:
    """One fit a stage; ``resumes`` leaves out those that are done and goes on with the one that was cut off.

    Where lightning starts the processes of several devices, every stage is a command of its own.
    """
    started_by_lightning = FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ
    started_by_launcher = not started_by_lightning and "LOCAL_RANK" in os.environ
    folder = run_folder(spec, "fit", args, resumes)
    if resumes and not any((folder / name / "last.ckpt").exists() for name in spec.stages):
        raise InputError("there is no last.ckpt to go on from", folder)
    several = False
    for number, name in enumerate(spec.stages):
        here = folder / name
        label = f"stage {number + 1} of {len(spec.stages)}: {name}"
        if resumes and (here / "export").exists():
            rank_zero_info(f"{label}: done")
            args = _from_export(args, here)
            continue
        rank_zero_info(label)
        stage_args = args
        if resumes and (here / "last.ckpt").exists():  # which brings the model's settings along
            stage_args = [*_without_model(args), f"--ckpt_path={here / 'last.ckpt'}"]
        elif not started_by_lightning:
            _refuse_earlier_run(here)
        if several:
            _fit_stage_apart(spec, [*stage_args, "--scale", scale, "--stage", name], folder)
        else:
            cli = ExperimentCLI(spec, ["fit", *stage_args], spec.configs(scale, name), here)
            if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
                return
            several = cli.trainer.world_size > 1 and not started_by_launcher
            if number + 1 == len(spec.stages):
                _test(cli)
            if started_by_lightning:
                return  # the first process goes on
        if number + 1 < len(spec.stages):
            quantised = read_metadata(here / "last.ckpt")["hyper_parameters"].get("quantization") is not None
            write_export(spec, here / "last.ckpt", here / "export", "adapter" if quantised else "merged")
            if started_by_launcher:
                cli.trainer.strategy.barrier()
            args = _from_export(args, here)
    rank_zero_info(f"everything of this run is in {folder}")


def _from_export(args: list[str], stage: Path) -> list[str]:
    return [*take(args, "--model.backbone", None)[1], f"--model.backbone={stage / 'export'}"]


def _without_model(args: list[str]) -> list[str]:
    """Arguments without ``--model.*``, each of which has its value behind ``=`` or as the next argument."""
    kept, skip = [], False
    for arg in args:
        if skip and not arg.startswith("--"):
            skip = False
            continue
        skip = arg.startswith("--model.") and "=" not in arg
        if not arg.startswith("--model."):
            kept.append(arg)
    return kept


def _refuse_earlier_run(folder: Path) -> None:
    if (folder / "last.ckpt").exists() and "LOCAL_RANK" not in os.environ:
        raise InputError("holds an earlier run; go on with --ckpt_path last, or choose another folder", folder)


def _fit_stage_apart(spec: Spec, args: list[str], folder: Path) -> None:
    left = (
        "LOCAL_RANK",
        "NODE_RANK",
        "WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        FOLDER_VARIABLE,
    )  # by the stage before
    environment = {name: value for name, value in os.environ.items() if name not in left}
    place = ["--trainer.default_root_dir", str(folder)]
    rest = take(args, "--trainer.default_root_dir", None)[1]
    command = [sys.executable, "-m", f"experiments.{spec.name}", "fit", *rest, *place]
    if code := subprocess.run(command, env=environment, check=False).returncode:
        raise SystemExit(code)


def _test(cli: ExperimentCLI) -> None:
    """Evaluate the final weights on the test queries."""
    if cli.trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


def run_folder(spec: Spec, verb: str, args: Sequence[str], resumes: bool) -> Path:
    """Folder of a run: what the user says, that of the checkpoint, or the next free one below ``runs``."""
    if FOLDER_VARIABLE in os.environ and "LOCAL_RANK" in os.environ:
        return Path(os.environ[FOLDER_VARIABLE])
    chosen, _ = take(list(args), "--trainer.default_root_dir", None)
    seed, _ = take(list(args), "--seed_everything", "0")
    folder = Path(chosen) if chosen else Path("runs") / spec.name / verb / f"seed{seed}"
    checkpoint, _ = take(list(args), "--ckpt_path", None)
    if resumes and verb == "fit" and not chosen and checkpoint not in (None, "last", "best"):
        folder = Path(str(checkpoint)).parent
        folder = folder.parent if folder.name in spec.stages else folder
    elif not chosen and verb == "fit" and "LOCAL_RANK" not in os.environ:
        number, free = 2, folder
        while free.exists() and any(free.rglob("last.ckpt")):
            folder, free = free, folder.with_name(f"seed{seed}-{number}")
            number += 1
        folder = folder if resumes else free  # the latest run, or never over an earlier one
    os.environ[FOLDER_VARIABLE] = str(folder)
    return folder


def _with_last(args: list[str], folder: Path) -> list[str]:
    """``--ckpt_path last`` as the path it means, so that its hyperparameters are read."""
    checkpoint, rest = take(args, "--ckpt_path", None)
    if checkpoint != "last":
        return args
    if not (folder / "last.ckpt").exists():
        raise InputError("there is no last.ckpt to go on from", folder)
    return [*rest, f"--ckpt_path={folder / 'last.ckpt'}"]


def _stage_of_checkpoint(spec: Spec, args: list[str]) -> str | None:
    checkpoint, _ = take(args, "--ckpt_path", None)
    if not spec.stages or checkpoint in (None, "last", "best"):
        return None
    stage = read_metadata(Path(str(checkpoint))).get("hyper_parameters", {}).get("stage")
    return stage if stage in spec.stages else None


def read_metadata(path: Path) -> dict[str, Any]:
    """Everything of a checkpoint but the weights' meaning: the file itself, or a sharded folder's metadata.

    Raises:
        InputError: There is no such checkpoint, or it cannot be read.
    """
    file = path / "meta.pt" if path.is_dir() else path
    if not file.is_file():
        raise InputError("checkpoint not found" if not path.is_dir() else "this folder is no checkpoint", path)
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever the bytes provoke
        raise InputError(f"not a checkpoint of this suite ({str(error).splitlines()[0]})", path) from None


def export(spec: Spec, options: argparse.Namespace) -> None:
    """Write the folder of a trained method, or of an untrained backbone."""
    if (options.ckpt_path is None) == (options.backbone is None):
        raise InputError("export needs either --ckpt_path or --backbone")
    if options.ckpt_path is not None:
        write_export(spec, options.ckpt_path, options.output, options.form)
    else:
        module = load(spec.method)(backbone=options.backbone)
        module.configure_model()
        module.export(options.output, options.form)
    rank_zero_info(f"wrote {options.output}")


@rank_zero_only
def write_export(spec: Spec, checkpoint: Path, output: Path, form: str) -> None:
    """Export a checkpoint; a sharded one is put together first."""
    method = load(spec.method)
    check_method(read_metadata(checkpoint), method.__name__, checkpoint)
    with TemporaryDirectory() as folder:
        if checkpoint.is_dir():
            whole = Path(folder) / "whole.ckpt"
            torch.save(_consolidate(checkpoint), whole)
            checkpoint = whole
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Found keys that are in the model state dict")  # quantised layers
            module = method.load_from_checkpoint(checkpoint, map_location="cpu", weights_only=True)
    module.export(output, form)


def _consolidate(folder: Path) -> dict[str, Any]:
    from lightning.fabric.utilities.load import _load_distributed_checkpoint

    return _load_distributed_checkpoint(folder)


def _check_precision(trainer: Any) -> None:
    """Lightning would round everything, the rotary frequencies included, which the exported model has exact."""
    if trainer["precision"] in ("bf16-true", "16-true"):
        dtype = {"bf16-true": "bfloat16", "16-true": "float16"}[trainer["precision"]]
        raise InputError(
            f"--trainer.precision {trainer['precision']} rounds position frequencies; use --trainer.precision "
            f"32-true with --model.loading.dtype {dtype}"
        )


def _check_devices(trainer: Any) -> None:
    """Lightning would start any number of CPU processes."""
    devices, accelerator = str(trainer["devices"]), str(trainer["accelerator"])
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not torch.cuda.is_available())
    cores = os.cpu_count() or 1
    if on_cpu and devices.isdigit() and int(devices) > cores:
        raise InputError(f"--trainer.devices {devices}: this machine has no GPU and {cores} CPU cores")
