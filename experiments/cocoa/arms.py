"""CoCoA beside training without its stages, from one captioning backbone; with all contrastive pairs and a tenth."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from experiments.cocoa.figures import figures
from experiments.cocoa.pictures import write_reconstructions, write_retrieval
from experiments.cocoa.probe import linear_probe
from experiments.retrieval import exported
from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.presets import is_preset
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.results import read_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI
from lit_embed.data.scenes import build_scenes, probe_items
from lit_embed.methods.cocoa import SMALL_GAP, small_gap
from lit_embed.modules.multimodal import build_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import Direction, MultimodalConfig

CAPTIONS, WARM, BRIDGE = "captions", "warm", "bridge"
COUNTED = (WARM, BRIDGE)  # arms of the first two stages, of which the paper counts one in epochs
STAGES = ("warmup", "reconstruction", "contrastive")
PROBED = 1000  # pictures that the probe learns from
SHOWN = 5  # reconstructions that are shown
TENTH = "--data.limit=0.1"
CAUSAL = "--model.encoder.attention=causal"


@dataclass(frozen=True)
class Trained:
    """A contrastive arm: its name and title, the arm that it goes on from, flags, and whether it is main.

    Args:
        name: Of the arm.
        title: In tables.
        start: Arm that it begins from.
        flags: Of its fit.
        main: Whether it is run by default.
        tenth: Whether its run with a tenth of the pairs is.
        equal: Whether it takes the steps of all stages.
    """

    name: str
    title: str
    start: str
    flags: tuple[str, ...] = ()
    main: bool = False
    tenth: bool = False
    equal: bool = False


BRIDGES = {  # the second stage: title, start, bridge, whether it is main
    BRIDGE: ("after stage 2", WARM, "collaborative", True),
    "bridge_cold": ("after stage 2, no stage 1", CAPTIONS, "collaborative", False),
    "bridge_strict": ("after stage 2, strict", WARM, "strict", False),
    "bridge_one_way": ("after stage 2, one way", WARM, "one_way", False),
}
ARMS = (
    Trained("causal", "causal, contrastive (VLM2Vec-like)", CAPTIONS, (CAUSAL,), main=True),
    Trained("bidirectional", "bidirectional, contrastive", CAPTIONS, main=True),
    Trained("equal", "bidirectional, steps of all stages", CAPTIONS, main=True, tenth=True, equal=True),
    Trained("warm_only", "stage 1, contrastive (MoCa-like)", WARM),
    Trained("cold", "stage 2, contrastive", "bridge_cold"),
    Trained("cocoa", "CoCoA", "bridge", main=True, tenth=True),
    Trained("strict", "CoCoA, strict bridge", "bridge_strict"),
    Trained("one_way", "CoCoA, one-way bridge", "bridge_one_way"),
)


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    captioned = is_preset(setting.value("contrastive", "model.backbone"))
    arms = [Arm(CAPTIONS, "captioned start", lambda c: _stage(setting, c, "captioning", None), seeded=False)]
    arms = arms if captioned else []

    def start(name: str) -> tuple[str, ...]:
        return (name,) if captioned or name != CAPTIONS else ()

    arms.append(Arm(WARM, "after stage 1", lambda c: _stage(setting, c, "warmup", CAPTIONS), needs=start(CAPTIONS)))
    for name, (title, before, bridge, main) in BRIDGES.items():
        arms.append(_bridge_arm(setting, name, title, before, bridge, main, start(before)))
    counted = COUNTED if setting.scale == "paper" else ()
    needs = {one.name: (*start(one.start), *(counted if one.equal else ())) for one in ARMS}
    for one in ARMS:
        arms.append(_trained_arm(setting, one, one.name, one.title, one.main, (), needs[one.name]))
    for one in ARMS:
        title, main = f"{one.title}, a tenth of the pairs", one.tenth
        arms.append(_trained_arm(setting, one, f"{one.name}_tenth", title, main, (TENTH,), needs[one.name]))
    metric = "p@1"
    pairs = [(claim, ours, theirs) for claim, ours, theirs in (
        ("CoCoA beats contrastive training", "cocoa", "bidirectional"),
        ("CoCoA beats as many steps of contrastive training", "cocoa", "equal"),
        ("CoCoA beats causal contrastive training", "cocoa", "causal"),
        ("Stage 2 helps", "cocoa", "warm_only"),
        ("Stage 1 helps before stage 2", "cocoa", "cold"),
        ("The collaborative bridge beats the strict one", "cocoa", "strict"),
        ("The collaborative bridge beats the one-way one", "cocoa", "one_way"),
    )]  # fmt: skip
    claims = (
        Claim("Stage 2 puts more attributes into the bridge token than stage 1", "probe", "bridge", WARM),
        *([Claim("and than captioning", "probe", "bridge", CAPTIONS)] if captioned else []),
        *(Claim(text, metric, ours, theirs) for text, ours, theirs in pairs),
        *(Claim(f"{text}, a tenth of the pairs", metric, f"{ours}_tenth", f"{theirs}_tenth")
          for text, ours, theirs in pairs),
        Claim("CoCoA beats as many steps out of domain", "p@1/ood", "cocoa", "equal"),
    )  # fmt: skip
    table = (metric, "p@1/ind", "p@1/ood", *(f"p@1/group/{group}" for group in
             ("classification", "vqa", "retrieval", "grounding")), "probe", "bridge_gap", "end_shift")  # fmt: skip
    curves = ("train/loss", "val/loss", "val/bridge_gap", "val/p@1", "val/p@1/ood", "val/image_loss", "val/text_loss")
    notes = (
        "Precision@1 counts ties as wrong; 'p@1' is the mean over tasks, each in and out of domain.",
        f"'probe' is the mean accuracy of a logistic regression per attribute on the bridge token of pictures, learned "
        f"from {PROBED}, before stage 3, under the attention of the stage; 'bridge_gap' what a target costs more "
        "behind another query, in nats a token; 'end_shift' the cosine distance between the bridge token's states with "
        "and without a target beside it.",
        "'steps of all stages' takes the optimizer steps of the three stages in the contrastive one.",
    )
    stages = [path.read_text() for stage in ("captioning",) for path in setting.spec.configs(setting.scale, stage)]
    fingerprint = "\n".join((setting.fingerprint(), *stages))
    jobs = 2 if setting.scale != "paper" else 1
    return Experiment("cocoa", tuple(arms), claims, table, fingerprint, curves, jobs, notes, figures)


def _bridge_arm(
    setting: Setting, name: str, title: str, before: str, bridge: str, main: bool, needs: tuple[str, ...]
) -> Arm:
    def run(context: ArmContext) -> None:
        _stage(setting, context, "reconstruction", before, [f"--model.bridge={bridge}"])

    return Arm(name, title, run, main=main, needs=needs)


def _trained_arm(
    setting: Setting, one: Trained, name: str, title: str, main: bool, flags: Sequence[str], needs: tuple[str, ...]
) -> Arm:
    def run(context: ArmContext) -> None:
        every = [*_start(context, one.start), *one.flags, *flags]
        if one.equal:
            every.append(f"--trainer.max_steps={_steps(setting, context)}")
        cli = setting.fit(context.folder / "fit", context.seed, every, "contrastive")
        cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)
        module: Any = cli.model
        _copy_curves(context.folder, cli)
        if name == "cocoa":
            write_retrieval(context.folder, module.vectors, module.precision.tasks)
        write_results(context.folder, module.precision.metrics(), module.precision.per_item(), _cost(cli))

    return Arm(name, title, run, main=main, needs=needs)


def _steps(setting: Setting, context: ArmContext) -> int:
    """Optimizer steps of the three stages together; of a stage that counts epochs those that its arm has taken."""
    steps = [setting.value(stage, "trainer.max_steps") for stage in STAGES]
    for number, arm in enumerate(COUNTED):
        if steps[number] < 1 and arm in context.needed:
            steps[number] = int(read_results(context.of(arm)).cost["steps"])
    if min(steps) < 1:
        raise InputError("equal compute is counted in steps: state them for every stage", field="trainer.max_steps")
    return sum(steps)


def _stage(setting: Setting, context: ArmContext, stage: str, before: str | None, flags: Sequence[str] = ()) -> None:
    """Fit a stage before the contrastive one, export it, and look at what its bridge token holds."""
    cli = setting.fit(context.folder / "fit", context.seed, [*_start(context, before), *flags], stage)
    cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)  # a restart may have missed the last one
    values = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    metrics = {"val/loss": values["val/loss"]}
    module: Any = cli.model
    if stage == "reconstruction":
        metrics |= {"bridge_gap": values["val/bridge_gap"], "end_shift": values["val/end_shift"]}
        if metrics["bridge_gap"] < SMALL_GAP:
            print(f"{context.arm} seed {context.seed}: {small_gap(metrics['bridge_gap'])}", flush=True)
        rows = cli.datamodule.val_dataloader()[-1].dataset
        with module.encoder_in_evaluation():
            chosen = [number * (len(rows) - 1) // (SHOWN - 1) for number in range(SHOWN)]
            write_reconstructions(context.folder, module, [rows[0, number, number] for number in chosen])
    folder = exported(cli, context.folder / "export")
    if cli.datamodule.path == "scenes":
        metrics |= _probe(context, folder, cli, "causal" if stage == "captioning" else None)
    _copy_curves(context.folder, cli)
    write_results(context.folder, metrics, cost=_cost(cli))


def _probe(context: ArmContext, folder: Path, cli: ExperimentCLI, attention: Direction | None) -> Mapping[str, float]:
    """What a linear map reads off the bridge token, under the attention that the stage has trained."""
    encoder = build_multimodal_encoder(str(folder), MultimodalConfig(attention=attention))
    scenes = build_scenes(cli.datamodule.scenes)
    (train, train_labels), (test, test_labels) = (probe_items(scenes, part) for part in ("train", "test"))
    vectors = [encoder.encode(items, "query", progress=False) for items in (train[:PROBED], test)]
    found = linear_probe(vectors[0], train_labels[:PROBED], vectors[1], test_labels)
    write_json(context.folder / "probe.json", found)
    return {"probe": sum(found.values()) / len(found), **{f"probe/{name}": value for name, value in found.items()}}


def _start(context: ArmContext, before: str | None) -> list[str]:
    return [f"--model.backbone={context.of(before) / 'export'}"] if before in context.needed else []


def _copy_curves(folder: Path, cli: ExperimentCLI) -> None:
    path = cli.folder / "curves.json"
    write_json(folder / "curves.json", read_json(path) if path.exists() else {})


def _cost(cli: ExperimentCLI) -> dict[str, float]:
    return {"tokens": float(cli.throughput.tokens), "steps": float(cli.trainer.global_step)}
