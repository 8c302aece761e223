"""MGS beside mixing, stages, experts and their merges, all at the same number of responses; and the gradient study.

With ``D`` domains, an expert is trained for a ``D``-th of the updates, on one domain. An order of stages begins with an
expert; a merge takes all of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from experiments.mgs import START_SPEC
from experiments.mgs.bandit import BanditConfig, BanditGranularity, run_bandit
from experiments.mgs.figures import figures
from experiments.mgs.stages import expert, expert_name, merged, sequence, sequence_name
from experiments.policies import START, needs_start, side_by_side, start_arm, train
from lit_core.files import read_json, write_json
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.setting import Setting

SURGERY = "--model.surgery."
BANDIT_SEEDS = range(20)


@dataclass(frozen=True)
class Together:
    """One way to train on all domains at once: name and title of the arm, flags, whether it is run by default."""

    name: str
    title: str
    flags: tuple[str, ...] = ()
    main: bool = False


TOGETHER = (
    Together("mixed", "mixing", (f"{SURGERY}method=sum",), main=True),
    Together("global", "global surgery (PCGrad)", (f"{SURGERY}granularity=global",), main=True),
    Together("mgs", "MGS", main=True),
    Together("mgs_block", "MGS by block", (f"{SURGERY}granularity=block",)),
    Together("mgs_layer", "MGS by layer", (f"{SURGERY}granularity=layer",)),
    Together("normalised", "normalised advantage", (f"{SURGERY}method=sum", "--model.normalisation=domain"), main=True),
    Together("gradvac", "GradVac by parameter", (f"{SURGERY}method=gradvac",)),
    Together("cagrad", "CAGrad by parameter", (f"{SURGERY}method=cagrad",)),
    Together("mgda", "MGDA by parameter", (f"{SURGERY}method=mgda",)),
)
BANDITS: tuple[tuple[str, str, BanditGranularity, bool], ...] = (  # name, title, granularity, surgery
    ("mixed", "mixing", "param", False),
    ("global", "global surgery", "global", True),
    ("linear", "surgery by linear layer", "linear", True),
    ("param", "surgery by parameter", "param", True),
)


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = (START,) if needs_start(setting) else ()
    settings: dict[str, Any] = setting.value(None, "data.domains")
    domains = tuple(settings)
    orders = list(dict.fromkeys([domains, domains[::-1]])) if len(domains) > 1 else []
    arms = [_bandit_arm(setting, *part, told) for told in (False, True) for part in BANDITS]
    if needs:
        arms.append(start_arm(setting, spec=START_SPEC))
    arms += [_together_arm(setting, needs, part) for part in TOGETHER]
    arms += [expert(setting, needs, domain, len(domains)) for domain in domains]
    arms += [sequence(setting, needs, order) for order in orders]
    arms += [merged(setting, needs, domains, method) for method in ("linear", "task_arithmetic")]
    metric = "reward"
    claims = (
        Claim("Bandit: surgery by parameter is ahead of mixing early", "early", "bandit_param", "bandit_mixed"),
        Claim("Bandit: global surgery is ahead of mixing early", "early", "bandit_global", "bandit_mixed"),
        Claim("Bandit: surgery by parameter is ahead of global surgery early", "early", "bandit_param",
              "bandit_global"),
        Claim("Bandit: surgery by parameter is ahead of mixing late", "late", "bandit_param", "bandit_mixed"),
        *([Claim("MGS gets more than its start", metric, "mgs", START)] if needs else []),
        Claim("MGS gets more than mixing", metric, "mgs", "mixed"),
        Claim("Global surgery gets more than mixing", metric, "global", "mixed"),
        Claim("MGS gets more than global surgery", metric, "mgs", "global"),
        Claim("MGS gets more than MGS by block", metric, "mgs", "mgs_block"),
        Claim("MGS gets more than normalised advantage", metric, "mgs", "normalised"),
        *(Claim(f"MGS gets more than {title}", metric, "mgs", arm)
          for arm, title in (("gradvac", "GradVac"), ("cagrad", "CAGrad"), ("mgda", "MGDA"))),
        Claim("MGS gets more than uniform merging", metric, "mgs", "linear"),
        Claim("MGS gets more than task arithmetic", metric, "mgs", "task_arithmetic"),
        *(Claim(f"The expert of {domain} gains there", f"{domain}/reward", expert_name(domain), START)
          for domain in domains if needs),
        *(_claims_of_order(order) for order in orders),
        *(Claim(f"MGS gets more than {' → '.join(order)}", metric, "mgs", sequence_name(order)) for order in orders),
        Claim("MGS gets more than mixing in its worst domain", "domain_worst/reward", "mgs", "mixed"),
    )  # fmt: skip
    rewards = [f"{domain}/reward" for domain in domains]
    table = (metric, "domain_worst/reward", *rewards, "forgetting", "rigidity", "entropy", "conflict_ratio", "hidden",
             "early", "late")  # fmt: skip
    curves = (*(f"val/{name}" for name in ("reward", *rewards)), "val/domain_worst/reward",
              *(f"val/{domain}/{name}" for domain in domains for name in ("entropy", "length")),
              "surgery/conflict_ratio", "surgery/cosine", "surgery/magnitude")  # fmt: skip
    notes = (
        f"Every arm draws as many responses: an expert 1/{len(domains)} of them, from which the orders and the merges "
        "go on. 'reward' is the mean over all problems, of which every domain has as many.",
        "'forgetting': what a domain loses from the end of its own stage to the end, the mean over all but the last; "
        "'rigidity': what a domain's expert is ahead of its stage, the mean over all but the first.",
        f"The bandit's intervals are over {len(_bandit_seeds(setting))} seeds, the same problems and noise for every "
        "row: 'early' and 'late' are expected rewards, 'hidden' the share that conflicts in a module among the pairs "
        "of gradients that agree as a whole.",
        "'conflict_ratio' counts modules as the arm has them (mixing: parameters); unrelated gradients would give .5.",
        "The factor of task arithmetic is chosen on validation problems.",
        *(["The reward of a reward model has no bounds: where it is one of the domains, read them one by one, not by "
           "their mean or the worst."] if any(one["task"] == "preference" for one in settings.values()) else []),
    )  # fmt: skip
    jobs = side_by_side(setting)
    fingerprint = setting.fingerprint() + "".join(p.read_text() for p in START_SPEC.configs(setting.scale))
    return Experiment("mgs", tuple(arms), claims, table, fingerprint, curves, jobs, notes, figures)


def _claims_of_order(order: Sequence[str]) -> Claim:
    first = order[0]
    text = f"{' → '.join(order)} forgets {first}"
    return Claim(text, f"{first}/reward", sequence_name(order), expert_name(first), larger_is_better=False)


def _together_arm(setting: Setting, needs: tuple[str, ...], part: Together) -> Arm:
    def run(context: ArmContext) -> None:
        train(setting, context, part.flags, extra=lambda cli: _interference(read_json(cli.folder / "curves.json")))

    return Arm(part.name, part.title, run, main=part.main, needs=needs)


def _interference(curves: Mapping[str, Any]) -> dict[str, float]:
    """How often gradients were in conflict, the mean over the recorded updates; nothing with one domain."""
    recorded = curves.get("surgery/conflict_ratio", ())
    return {"conflict_ratio": fmean(value for _, value in recorded)} if recorded else {}


def _bandit_seeds(setting: Setting) -> range:
    return BANDIT_SEEDS[:3] if setting.scale == "smoke" else BANDIT_SEEDS


def _bandit_arm(
    setting: Setting, name: str, title: str, granularity: BanditGranularity, surgery: bool, told: bool
) -> Arm:
    config = BanditConfig(told=told, early=20, late=40) if setting.scale == "smoke" else BanditConfig(told=told)

    def run(context: ArmContext) -> None:
        found = run_bandit(config, _bandit_seeds(setting), granularity, surgery)
        columns = {"early": found.at(config.early).mean(1), "late": found.at(config.late).mean(1),
                   "conflict_ratio": found.conflicts, "hidden": found.hidden}  # fmt: skip
        items = {key: {str(seed): value for seed, value in enumerate(values.tolist())}
                 for key, values in columns.items()}  # fmt: skip
        points = [
            [[step, value] for step, value in zip(found.curve, seed, strict=True)]
            for seed in found.values.mean(2).T.tolist()
        ]
        write_json(context.folder / "bandit.json", points)
        metrics = {key: fmean(values.values()) for key, values in items.items()}
        write_results(context.folder, metrics, items, {"steps": float(config.late)})

    prefix, where = ("bandit_told", ", told the domain") if told else ("bandit", "")
    return Arm(f"{prefix}_{name}", f"bandit{where}: {title}", run, main=not told, seeded=False)
