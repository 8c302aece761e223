"""PPO with each exploration term, at the coefficient that suits it best, and the tabular study.

Every term with a coefficient is tuned among the same values, with a seed of its own and on the validation problems: a
grid, and that grid divided by TRE's scale factor, which would give it a larger effective coefficient otherwise.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from experiments.policies import START, TABLE, backbone_flags, finish, needs_start, side_by_side, start_arm, train
from experiments.tre.sweep import Trial, write_sweep
from experiments.tre.tabular import study
from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.setting import Setting

GRID = (0.01, 0.1)
TUNING_SEED = 1000
TABULAR, MORE, SWEEP = "tabular", "tabular_more", "sweep"
KIND, COEFFICIENT = "--model.exploration.kind", "--model.exploration.coefficient"
NO_SCALE = "--model.exploration.scale=none"
LONG = ("--data.countdown.least_numbers=4", "--data.countdown.most_numbers=4")  # responses of about 14 tokens


@dataclass(frozen=True)
class Term:
    """One way to keep exploring.

    Args:
        name: Of the arm.
        title: In tables.
        flags: What chooses it.
        tuned: Whether it has a coefficient.
        main: Whether it is run by default.
    """

    name: str
    title: str
    flags: tuple[str, ...]
    tuned: bool = False
    main: bool = False


TERMS = (
    Term("none", "PPO", (f"{KIND}=none",), main=True),
    Term("entropy", "PPO + entropy", (f"{KIND}=entropy",), tuned=True, main=True),
    Term("tre_k", "TRE-K, K = 2", (f"{KIND}=tre_k",), tuned=True, main=True),
    Term("tre_p", "TRE-P, P = .99", (f"{KIND}=tre_p",), tuned=True, main=True),
    Term("tre_k_unscaled", "TRE-K without the factor", (f"{KIND}=tre_k", NO_SCALE), tuned=True),
    Term("tre_k_mass", "TRE-K, mass kept", (f"{KIND}=tre_k", "--model.exploration.mass_preserving=true"), tuned=True),
    Term("adaptive_entropy", "PPO + adaptive entropy", (f"{KIND}=adaptive_entropy", f"{COEFFICIENT}=0.0")),
    Term("forking", "forking tokens", (f"{KIND}=forking",)),
    Term("kl_cov", "KL-Cov", (f"{KIND}=kl_cov",)),
    Term("clip_cov", "Clip-Cov", (f"{KIND}=clip_cov", "--model.loss.clip_low=1.0", "--model.loss.clip_high=1.0")),
    Term("clip_higher", "clip-higher", (f"{KIND}=clip_higher",)),
)


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    tuning = setting.scale != "paper"  # there the paper's coefficient is taken
    needs = (START,) if needs_start(setting) else ()
    arms = [
        Arm(TABULAR, "tabular study", lambda context: _tabular(context, False), seeded=False, hidden=True),
        Arm(MORE, "tabular study, all parts", lambda c: _tabular(c, True), main=False, seeded=False, hidden=True),
    ]
    if needs:
        arms.append(start_arm(setting))
    for term in TERMS:
        arms += _term_arms(setting, term, needs, tuning)
    if tuning:
        arms.append(_sweep_arm(setting))
    if needs:
        arms.append(start_arm(setting, "sft_long", LONG, main=False))
        for name in ("none", "entropy", "tre_k"):
            arms.append(_long_arm(setting, next(term for term in TERMS if term.name == name), tuning))
    metric = "success"
    claims = (
        Claim("TRE-K solves more than PPO", metric, "tre_k", "none"),
        Claim("TRE-K solves more than the entropy bonus", metric, "tre_k", "entropy"),
        Claim("TRE-P solves more than PPO", metric, "tre_p", "none"),
        Claim("TRE-K leaves less mass in the tail than the entropy bonus", "tail_mass", "tre_k", "entropy", False),
        Claim("TRE-K makes fewer invalid answers than the entropy bonus", "invalid", "tre_k", "entropy", False),
        Claim("TRE-K keeps more entropy inside the region than PPO", "region_entropy", "tre_k", "none"),
        Claim("The factor helps TRE-K", metric, "tre_k", "tre_k_unscaled"),
        Claim("TRE-K solves more than KL-Cov", metric, "tre_k", "kl_cov"),
        Claim("TRE-K solves more than Clip-Cov", metric, "tre_k", "clip_cov"),
        Claim("TRE-K solves more than forking tokens", metric, "tre_k", "forking"),
    )
    metrics = (*TABLE, "region_entropy", "region_size", "coefficient")
    curves = ("val/success", "val/entropy", "val/tail_mass", "val/invalid", "val/region_entropy", "rollout/reward_mean")
    chosen = (
        f"The coefficient of every tuned term was chosen among the same {', '.join(map(str, _grid(setting)))} (a grid, "
        f"and the grid divided by TRE's factor) by the success on validation problems of one run with seed "
        f"{TUNING_SEED}.",
        f"What every coefficient does stands in {SWEEP}/seed0/sweep.md.",
    )
    tabular = (
        f"The tabular study stands in {TABULAR}/seed0/tabular.md, with --arms all also in {MORE}/seed0/tabular.md."
    )
    notes = (*(chosen if tuning else ()), tabular)
    return Experiment("tre", tuple(arms), claims, metrics, setting.fingerprint(), curves, side_by_side(setting), notes)


def _term_arms(setting: Setting, term: Term, needs: tuple[str, ...], tuning: bool) -> list[Arm]:
    """A term's trials, hidden, and the term at its best coefficient."""
    trials = [_trial_arm(setting, term, needs, value) for value in _grid(setting)] if term.tuned and tuning else []
    names = tuple(arm.name for arm in trials)

    def run(context: ArmContext) -> None:
        flags = [*term.flags]
        if names:
            flags.append(f"{COEFFICIENT}={_best(context, names)}")
        train(setting, context, flags, extra=lambda cli: {"coefficient": cli.model.entropy_coef if term.tuned else 0.0})

    return [*trials, Arm(term.name, term.title, run, main=term.main, needs=(*needs, *names))]


def _trial_arm(setting: Setting, term: Term, needs: tuple[str, ...], coefficient: float) -> Arm:
    def run(context: ArmContext) -> None:
        flags = [*backbone_flags(context), *term.flags, f"{COEFFICIENT}={coefficient}"]
        cli = setting.fit(context.folder / "fit", TUNING_SEED, flags)
        cli.trainer.validate(cli.model, datamodule=cli.datamodule, verbose=False)
        write_json(context.folder / "trial.json", {"coefficient": coefficient})
        finish(context, cli)

    name = _trial_name(term, coefficient)
    return Arm(name, f"{term.title}, {coefficient:g}", run, main=False, seeded=False, needs=needs, hidden=True)


def _sweep_arm(setting: Setting) -> Arm:
    """Tables and figures over the trials of the main terms."""
    names = {_trial_name(term, value): term for term in TERMS if term.tuned and term.main for value in _grid(setting)}

    def run(context: ArmContext) -> None:
        trials = []
        for name, term in names.items():
            folder = context.of(name)
            metrics = read_json(folder / "results.json")["metrics"]
            trials.append(Trial(term.title, read_json(folder / "trial.json")["coefficient"], metrics))
        write_sweep(context.folder, trials)
        write_results(context.folder, {"trials": float(len(trials))})

    return Arm(SWEEP, "coefficients", run, seeded=False, needs=tuple(names), hidden=True)


def _trial_name(term: Term, coefficient: float) -> str:
    return f"trial_{term.name}_{coefficient:g}"


def _grid(setting: Setting) -> tuple[float, ...]:
    """Coefficients of every tuned term."""
    if setting.scale == "smoke":
        return GRID[:1]
    factor = _factor(setting)
    return tuple(sorted({*GRID, *(float(f"{value / factor:.2g}") for value in GRID)}))


def _factor(setting: Setting) -> float:
    """``log V / log K`` of the policy at K = 2."""
    from lit_core.presets import PRESETS

    backbone = setting.value(None, "model.backbone")
    vocabulary = PRESETS[backbone].vocab_size if backbone in PRESETS else 151_936
    return math.log(vocabulary) / math.log(2)


def _best(context: ArmContext, trials: Sequence[str]) -> float:
    """Coefficient of the trial with the most success; the smaller one of two that are equal."""
    found: list[tuple[float, float]] = []
    for name in trials:
        folder = context.of(name)
        value: Any = read_json(folder / "results.json")["metrics"]["success"]
        found.append((-value, read_json(folder / "trial.json")["coefficient"]))
    return min(found)[1]


def _long_arm(setting: Setting, term: Term, tuning: bool) -> Arm:
    """A term on problems with one number more, at the coefficient that was chosen for the shorter ones."""
    trials = tuple(_trial_name(term, value) for value in _grid(setting)) if term.tuned and tuning else ()

    def run(context: ArmContext) -> None:
        flags = [*LONG, *term.flags, *([f"{COEFFICIENT}={_best(context, trials)}"] if trials else [])]
        train(setting, context, flags, start="sft_long")

    needs = ("sft_long", MORE, *trials)  # the longer horizon of both parts goes together
    return Arm(f"{term.name}_long", f"{term.title}, 4 numbers", run, main=False, needs=needs)


def _tabular(context: ArmContext, extended: bool) -> None:
    found = study(context.folder, (0, 1, 2), context.scale == "smoke", extended)
    rewards = {f"{row['title']} {row['coefficient']:g}": row["metrics"]["reward"]["mean"]
               for row in found["rows"] if row["part"] == "main"}  # fmt: skip
    write_results(context.folder, rewards)
