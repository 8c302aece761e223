"""BOOM beside training on everything at once: schedules, granularities, ways to merge, ratios, updates, controls."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from experiments.boom.figures import figures
from experiments.boom.merges import (
    Merged,
    ensemble_arm,
    group_arm,
    interpolated_arm,
    last_checkpoints_arm,
    merged_arm,
    update_arm,
)
from experiments.boom.pairs import gains_arm
from experiments.boom.training import (
    BASE,
    BOTH,
    FULL,
    NEW,
    OLD,
    Trained,
    base_arm,
    data_of,
    groups_arm,
    names_flag,
    new_sets,
    trained_arm,
    two_stage_arm,
)
from lit_core.errors import InputError
from lit_core.reproduce import Arm, Claim, Experiment
from lit_core.setting import Setting
from lit_embed.data.bagging import size_weights, training_cost
from lit_embed.data.task_sources import FamiliesSource

LATE_SHARE = 0.1  # of the user's own data that arrives later, where nothing else is said
METRIC, OTHER = "in_domain", "out_of_domain"
# members by arm: percent of every set, number of the member, whether it takes the rows that the member leaves
MEMBERS: dict[str, tuple[float, int, bool]] = {
    "m20": (20, 0, False),
    "m40": (40, 1, False),
    "m60": (60, 2, False),
    "m80": (80, 3, False),
    "m60b": (60, 4, False),
    "m60c": (60, 5, False),
    "half": (50, 6, False),
    "rest": (50, 6, True),
}
MAIN_MEMBERS = ("m20", "m40", "m60", "m80")
ALL_RATIOS = (*MAIN_MEMBERS, FULL)  # the full run is the member of 100 percent
SCHEDULES = (
    Trained("by_set", "set after set", ("--data.schedule=dataset",), main=True),
    Trained("by_set_reversed", "set after set, the smallest first", ("--data.schedule=dataset",), smallest_first=True),
    Trained("by_task", "task type after task type", ("--data.schedule=task",)),
    Trained("mixed", "rows mixed", ("--data.schedule=mixed",)),
)
WAYS: dict[str, tuple[str, dict[str, float], bool]] = {  # of merging models of task types: title, options, with base
    "linear": ("linear", {}, False),
    "slerp": ("SLERP", {}, False),
    "multislerp": ("Multi-SLERP", {}, False),
    "karcher": ("Karcher mean", {}, False),
    "task_arithmetic": ("task arithmetic", {"normalize": True}, True),
    "ties": ("TIES", {"density": 0.5}, True),
    "dare_linear": ("DARE", {"density": 0.5, "normalize": True}, True),
    "sce": ("SCE", {}, True),
    "model_stock": ("Model Stock", {}, True),
}


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    setting = _with_late_rows(setting)
    _check_flags(setting)
    needs = (BASE,)
    steps = ("--checkpoint.save_top_k=-1", "--checkpoint.filename={step}")
    full = Trained(FULL, "BLS (batch-level shuffling)", steps, main=True)
    arms = [base_arm(setting), trained_arm(setting, full, needs, None)]
    for name, bag in MEMBERS.items():
        title = f"the other {bag[0]:g} %" if bag[2] else f"member, {bag[0]:g} %"
        one = Trained(name, title, cost=bag[0] / 100, order=1 + bag[1] + 10 * bag[2], main=name in MAIN_MEMBERS)
        arms.append(trained_arm(setting, one, needs, bag))
    longer = Trained("bls_3", "BLS, three times as long", _longer(setting, 3), cost=3.0, main=True)
    arms += [trained_arm(setting, one, needs, None) for one in (longer, *SCHEDULES)]
    arms.append(two_stage_arm(setting, needs))
    more = [Trained(f"bls_{word}", f"BLS, {word} order", order=order)
            for word, order in (("second", 21), ("third", 22))]  # fmt: skip
    arms += [trained_arm(setting, one, needs, None) for one in more]
    arms += [merged_arm(setting, one, needs) for one in _merges()]
    arms += [last_checkpoints_arm(setting, needs), ensemble_arm(setting, ALL_RATIOS, 3.0, needs)]
    arms += [interpolated_arm(setting, share, needs) for share in (0.25, 0.5, 0.75)]
    arms += _granularities(setting, needs)
    arms += _updates(setting, needs)
    table: tuple[str, ...] = (
        METRIC,
        OTHER,
        "mean_task",
        "mean_type",
        "old_tasks",
        "new_tasks",
        "cost",
        "drift",
        "from_linear",
    )
    data = data_of(setting)
    table += _own_tasks(data)
    trivial = _trivial_arms(_types(data), [arm.name for arm in arms])
    kept = [arm for arm in arms if arm.name not in trivial]
    claims = [claim for claim in _claims() if not {claim.arm, claim.baseline} & trivial.keys()]
    notes = (*_notes(), *([f"{', '.join(trivial)}: left out, {next(iter(trivial.values()))}."] if trivial else []))
    jobs = 1 if setting.scale == "paper" else 2
    return Experiment(
        "boom", tuple(kept), tuple(claims), table, _fingerprint(setting), ("train/loss",), jobs, notes, figures
    )


def _check_flags(setting: Setting) -> None:
    """Refuse flags under which arms could not be compared, before anything is trained."""
    if (quantization := setting.value(None, "model.quantization")) is not None:
        raise InputError(
            f"members are merged whole, which weights in {quantization} cannot be; leave it out", field="quantization"
        )
    if setting.value(None, "data.order") is not None:
        raise InputError("the arms differ in it, and most have none; leave it out, or use fit", field="order")


def _with_late_rows(setting: Setting) -> Setting:
    """Where no set of the data at hand is named as arriving later, a share of every set does."""
    said = any(flag.startswith("--data.new") for flag in setting.flags)
    built_in = setting.value(None, "data.path") in ("families", ["families"])
    if said or (built_in and setting.value(None, "data.new") is not None):
        return setting
    return replace(setting, flags=(*setting.flags, f"--data.new={LATE_SHARE}"))


def _fingerprint(setting: Setting) -> str:
    """That of the setting, and how the base is trained."""
    return "\n".join([setting.fingerprint(), *(p.read_text() for p in setting.spec.configs(setting.scale, "base"))])


def _longer(setting: Setting, times: int) -> tuple[str, ...]:
    """Flags of a fit that lasts several times as long, whatever bounds it."""
    bounds = {name: setting.value(None, f"trainer.{name}") for name in ("max_epochs", "max_steps")}
    return tuple(f"--trainer.{name}={times * value}" for name, value in bounds.items() if value and value > 0)


def _own_tasks(data: Any) -> tuple[str, ...]:
    """Scores of the user's own collections, one by one; the built-in tasks are too many for a table."""
    names = [source.name for source in data.sources() if not isinstance(source, FamiliesSource)]
    return () if "families" in data.paths or len(names) > 8 else tuple(f"task/{name}" for name in names)


def _types(data: Any) -> set[str]:
    """Task types that are trained on."""
    return {
        kind for source in data.sources() for name, kind in source.types().items() if data.trains_on(name, kind)
    }  # fmt: skip


def _trivial_arms(types: set[str], arms: Sequence[str]) -> dict[str, str]:
    """Arms that would only repeat BLS where all sets are of one task type, and why."""
    if len(types) < 2:
        found = [name for name in arms if name in ("by_task", "two_stage", "tasks") or name.startswith("merged_tasks_")]
        return dict.fromkeys(found, f"as BLS is the same where all sets are of one task type ({''.join(types)})")
    if "retrieval" not in types:
        return {"two_stage": "as BLS is the same without a set of type retrieval"}
    return {}


def _merges() -> list[Merged]:
    by_size = tuple(size_weights([20, 40, 60, 80, 100]))
    sixty = ("m60", "m60b", "m60c")
    soup = (FULL, "bls_second", "bls_third")
    return [
        Merged("boom", "BOOM {20..100}, by size", ALL_RATIOS, training_cost([20, 40, 60, 80, 100]), weights=by_size,
               main=True),
        Merged("boom_linear", "the same, linear", ALL_RATIOS, 3.0, "linear", by_size, main=True),
        Merged("boom_equal", "the same, equal weights", ALL_RATIOS, 3.0),
        Merged("boom_karcher", "the same, Karcher mean", ALL_RATIOS, 3.0, "karcher", by_size),
        Merged("boom_40_100", "BOOM {40..100}, by size", ALL_RATIOS[1:], training_cost([40, 60, 80, 100]),
               weights=tuple(size_weights([40, 60, 80, 100]))),
        Merged("boom_80_100", "BOOM {80, 100}, by size", ("m80", FULL), training_cost([80, 100]),
               weights=tuple(size_weights([80, 100])), main=True),
        Merged("boom_60", "BOOM {60, 60, 60}", sixty, training_cost([60, 60, 60])),
        Merged("half_and_rest", "BOOM {50} and the rest", ("half", "rest"), training_cost([50, 50])),
        Merged("soup", "soup of three BLS runs", soup, training_cost([100, 100, 100])),
    ]  # fmt: skip


def _granularities(setting: Setting, needs: tuple[str, ...]) -> list[Arm]:
    """Models of single sets, task types and clusters of sets, merged."""
    arms = [groups_arm(setting, "sets", "models of single sets", "set", needs)]
    arms.append(group_arm(setting, Merged("merged_sets", "a model a set, merged", ("sets",)), needs))
    arms.append(groups_arm(setting, "tasks", "models of task types", "type", needs))
    for method, (title, options, of_base) in WAYS.items():
        name = f"merged_tasks_{method}"
        one = Merged(name, f"a model a task type, {title}", ("tasks",), method=method, options=options, of_base=of_base)
        arms.append(group_arm(setting, one, needs))
    arms.append(gains_arm(setting, needs))
    arms.append(groups_arm(setting, "clusters", "models of clusters", "cluster", (*needs, "gains")))
    arms.append(group_arm(setting, Merged("merged_clusters", "a model a cluster, merged", ("clusters",)), needs))
    return arms


def _updates(setting: Setting, needs: tuple[str, ...]) -> list[Arm]:
    """A corpus that grows: what is done when new rows arrive, at the cost of that alone."""
    arms = [
        trained_arm(setting, Trained("old", "BLS on the old data", (OLD,), None, order=31, main=True), needs, None),
        trained_arm(setting, Trained("update", "update model alone", (BOTH,), None, order=32, main=True), needs, None),
        update_arm(setting, "updated", "old, update merged in", ("old", "update"), needs, main=True),
        trained_arm(setting, Trained("naive", "old, goes on with the new", (NEW,), None, "old", 33, True),
                    (*needs, "old"), None),
        trained_arm(setting, Trained("with_core", "old, goes on with new and core", (BOTH,), None, "old", 34),
                    (*needs, "old"), None),
    ]  # fmt: skip
    late = new_sets(setting)
    if len(late) > 1:  # they arrive one after the other
        arms += _two_updates(setting, needs, late)
    return arms


def _two_updates(setting: Setting, needs: tuple[str, ...], late: Sequence[str]) -> list[Arm]:
    """Half of the late sets arrive, then the others; the core grows with them."""
    first, second = late[: len(late) // 2], late[len(late) // 2 :]
    without = [*second, *(name for name in setting.value(None, "data.leave_out") or [] if name not in second)]
    flags = {
        "first": (BOTH, names_flag("new", first), names_flag("leave_out", without)),
        "second": (BOTH, names_flag("new", second)),
    }
    updates = [
        Trained(f"{word}_update", f"{word} update alone", of, None, order=35 + number, hidden=True)
        for number, (word, of) in enumerate(flags.items())
    ]
    arms = [trained_arm(setting, update, needs, None) for update in updates]
    chain = ("old", "first_update", "second_update")
    arms.append(update_arm(setting, "updated_twice", "old, two updates, a half each", chain, needs))
    arms.append(update_arm(setting, "updated_by_count", "old, two updates, by count", chain, needs, by_count=True))
    return arms


def _claims() -> tuple[Claim, ...]:
    schedules = (("by_set", "set after set"), ("by_set_reversed", "set after set, the smallest first"),
                 ("by_task", "task type after task type"), ("two_stage", "two stages"),
                 ("mixed", "mixed rows"), ("merged_sets", "a merged model a set"),
                 ("merged_tasks_multislerp", "a merged model a task type"),
                 ("merged_clusters", "a merged model a cluster"))  # fmt: skip
    rivals = ((FULL, "BLS"), ("bls_3", "BLS at as much compute"), ("soup", "a soup of three BLS runs"),
              ("interpolated_75", "BLS interpolated with the base"), ("last_checkpoints", "BLS's last checkpoints"),
              ("m60", "a member of 60 %"))  # fmt: skip
    return (
        *(Claim(f"(a) BLS beats {words}", METRIC, FULL, arm) for arm, words in schedules),
        Claim("(b) Multi-SLERP beats the linear mean", METRIC, "boom", "boom_linear"),
        Claim("(b) Multi-SLERP beats Model Stock on task types", METRIC, "merged_tasks_multislerp",
              "merged_tasks_model_stock"),
        Claim("(c) A merged update forgets less than going on", "old_tasks", "updated", "naive"),
        Claim("(c) A merged update learns the new better than going on", "new_tasks", "updated", "naive"),
        Claim("(c) A merged update beats training anew", METRIC, "updated", FULL),
        *(Claim(f"(d) BOOM beats {words}", metric, "boom", arm)
          for metric in (METRIC, OTHER) for arm, words in rivals),
    )  # fmt: skip


def _notes() -> tuple[str, ...]:
    return (
        "'cost' is what training took, where one run over all data costs 1; that of an update is the update's alone, "
        "that of clusters has in it the short runs by which they were found. "
        "Steps and tokens count everything a model rests on, the base included.",
        "'drift' is the mean norm of the members' differences from the base, as a share of the base's; 'from_linear' "
        "how far a merge lies from the linear one, as a share of that one's distance from the base. Where both are "
        "small, ways to merge cannot differ.",
        "'old_tasks' and 'new_tasks' are the in-domain tasks whose sets were there from the start, or one of whose "
        "sets arrives later.",
        "No member, weight or checkpoint is chosen by a score: all are final steps.",
    )
