"""ROSE beside GRPO's family and other trees: where trees branch, what is learned from them, and at what length."""

from collections.abc import Sequence
from pathlib import Path

from experiments.policies import START, TABLE, backbone_flags, needs_start, side_by_side, start_arm, train
from experiments.rose.figures import figures
from experiments.rose.places import look
from lit_core.files import read_json
from lit_core.reproduce import Arm, ArmContext, Claim, Experiment, write_results
from lit_core.setting import Setting
from lit_core.stages import ExperimentCLI

TREE = "--model.tree."
FLAT = (f"{TREE}sampler=independent",)
TOKEN_MEAN, HIGHER = "--model.loss.reduction=token_mean", "--model.loss.clip_high"
GRPO = (*FLAT, "--model.estimator=grpo", "--model.loss.reduction=seq_mean_token_mean")
DAPO = (*FLAT, "--model.estimator=grpo", TOKEN_MEAN, f"{HIGHER}=0.28")
DYNAMIC, STATIC = ("--model.rollout.dynamic=true",), ("--model.rollout.dynamic=false",)
FOLDER = Path(__file__).parent
SCORES = {  # of the first part: title, flags, whether it is run by default
    "random": ("anywhere", (f"{TREE}score=random",), True),
    "min_probability": ("least probable token", (f"{TREE}score=min_probability",), False),
    "entropy": ("entropy", (f"{TREE}score=entropy",), True),
    "divergence": ("divergence", (f"{TREE}score=divergence",), False),
    "offdiag": ("semantic entropy", (), True),
    "rao": ("semantic entropy, rao", (f"{TREE}variant=rao",), True),
    "allpairs": ("semantic entropy, all pairs", (f"{TREE}variant=allpairs",), False),
}
# (name, title, flags, whether it is run by default); shapes of other trees come from SHAPES
LEARNING: tuple[tuple[str, str, tuple[str, ...], bool], ...] = (
    ("grpo", "GRPO", GRPO, True),
    ("dr_grpo", "Dr. GRPO", (*FLAT, "--model.estimator=dr_grpo"), False),
    ("entropy_tree", "entropy tree", (f"{TREE}score=entropy",), True),
    ("rose", "ROSE", (), True),
    ("rose_rao", "ROSE, rao", (f"{TREE}variant=rao",), False),
    ("dapo", "DAPO", (*DAPO, *DYNAMIC), False),
    ("rose_dynamic", "ROSE, dynamic sampling", DYNAMIC, False),
    ("fr3e", "FR3E", (f"{TREE}sampler=fr3e", TOKEN_MEAN, f"{HIGHER}=0.3"), False),
    ("tree_po", "TreePO", (f"{TREE}sampler=tree_po", "--model.estimator=tree_po", TOKEN_MEAN, f"{HIGHER}=0.28",
                           "--model.loss.dual_clip=10"), False),
    ("tree_rl", "TreeRL", (f"{TREE}sampler=tree_rl", "--model.estimator=tree_rl"), False),
    ("spo_tree", "SPO-tree", (f"{TREE}sampler=spo_tree", "--model.estimator=spo_tree"), False),
    ("spo_chain", "SPO-chain", (f"{TREE}sampler=spo_chain",), False),
    ("tree_grpo", "Tree-GRPO", (f"{TREE}sampler=tree_grpo", "--model.estimator=tree_grpo"), False),
    ("random_tree", "random tree", (f"{TREE}score=random",), False),
    ("divergence_tree", "divergence tree", (f"{TREE}score=divergence",), False),
    ("whole_responses", "ROSE's trees, credit of Dr. GRPO", ("--model.estimator=dr_grpo",), False),
    ("epsilon_0", "ROSE, epsilon 0", (f"{TREE}epsilon=0",), False),
    ("alpha_0", "ROSE, alpha 0", ("--model.length_penalty=0",), False),
    ("alpha_3", "ROSE, alpha 3", ("--model.length_penalty=3",), False),
)  # fmt: skip
SMALL_SHAPES = {  # eight responses a prompt where the method makes them
    "fr3e": {"chains": "4", "points": "1", "children": "4"},
    "tree_po": {"segment": "12"},
    "tree_rl": {"chains": "2", "points": "1", "rounds": "1", "children": "3"},
    "spo_tree": {"segment": "10", "factors": "[2,2,2]"},
    "spo_chain": {"children": "2", "samples": "2"},
    "tree_grpo": {"chains": "2", "points": "3", "children": "1"},
}
SHAPES = {
    "smoke": SMALL_SHAPES,
    "tiny": SMALL_SHAPES,
    "paper": {  # those of the methods' own scripts: card 5
        "fr3e": {"chains": "4", "points": "4", "children": "16"},
        "tree_po": {"segment": "512", "samples": "16"},
        "tree_rl": {"chains": "6", "points": "2", "rounds": "1", "children": "2", "samples": "30", "kept": "16"},
        "spo_tree": {"segment": "600", "factors": "[6,6,6]", "samples": "216"},
        "spo_chain": {"children": "9", "samples": "1"},
        "tree_grpo": {"chains": "2", "points": "2", "children": "1", "samples": "6"},
    },
}
SAME_TOKENS = "grpo_tokens"
ALPHAS = {0.0: "alpha_0", 1.0: "rose", 3.0: "alpha_3"}  # the third part


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = (START,) if needs_start(setting) else ()
    warm = [f"--config={FOLDER / 'start.yaml'}"] if setting.scale == "tiny" else ["--data.task=countdown_steps"]
    arms: list[Arm] = [start_arm(setting, warm=warm)] if needs else []
    arms += [_place_arm(setting, name, *part, needs) for name, part in SCORES.items()]
    arms += [_learning_arm(setting, needs, *part) for part in LEARNING]
    arms.append(_same_tokens_arm(setting, needs))
    solved, metric = "success", f"pass@{setting.value(None, 'model.evaluation').samples}"
    claims = (
        Claim("Semantic entropy branches at decisions more than entropy", "decisions", "at_offdiag", "at_entropy"),
        Claim("Semantic entropy (rao) does", "decisions", "at_rao", "at_entropy"),
        Claim("Semantic entropy gives more distinct answers than entropy", "distinct_answers", "at_offdiag",
              "at_entropy"),
        Claim("Semantic entropy gives more mixed groups than entropy", "mixed", "at_offdiag", "at_entropy"),
        *([Claim("ROSE solves more than its start", solved, "rose", START)] if needs else []),
        Claim("ROSE solves more than GRPO, as many responses", solved, "rose", "grpo"),
        Claim("ROSE solves more than GRPO, as many tokens", solved, "rose", SAME_TOKENS),
        Claim("ROSE solves more than Dr. GRPO", solved, "rose", "dr_grpo"),
        Claim("ROSE solves more than entropy trees", solved, "rose", "entropy_tree"),
        Claim("ROSE covers more than GRPO, as many responses", metric, "rose", "grpo"),
        Claim("ROSE covers more than GRPO, as many tokens", metric, "rose", SAME_TOKENS),
        Claim("ROSE covers more than entropy trees", metric, "rose", "entropy_tree"),
        Claim("The length penalty shortens correct responses", "correct_length", "rose", "alpha_0", False),
        Claim("A larger one shortens them more", "correct_length", "alpha_3", "rose", False),
        Claim("Credit for segments helps, without a penalty", solved, "alpha_0", "whole_responses"),
        Claim("Restarts help", solved, "rose", "epsilon_0"),
        Claim("ROSE covers more than FR3E", metric, "rose", "fr3e"),
        Claim("ROSE covers more than TreePO", metric, "rose", "tree_po"),
        Claim("ROSE covers more than TreeRL", metric, "rose", "tree_rl"),
        Claim("ROSE covers more than DAPO, both with dynamic sampling", metric, "rose_dynamic", "dapo"),
    )  # fmt: skip
    table = (*TABLE[:1], metric, "correct_length", "entropy", "decisions", "connectors", "distinct_answers", "mixed",
             "entropy_percentile", "tokens_drawn")  # fmt: skip
    curves = ("val/success", f"val/{metric}", "val/length", "val/entropy", "rollout/all_equal", "rollout/table_cosine",
              "tree/entropy_percentile")  # fmt: skip
    notes = (
        "Branching arms draw trees with the start's weights; their intervals are over problems. 'decisions' and "
        "'connectors' are shares of the branches, 'mixed' that of groups with both outcomes.",
        "Every learning arm has the start, problems, learning rate, updates and clipping of the others, where its "
        "method does not say otherwise, and eight responses a prompt; FR3E draws up to twenty, SPO-chain two with "
        f"continuations. '{SAME_TOKENS}' ends when it has drawn ROSE's tokens.",
        "'correct_length' is the mean over whichever responses are right; it moves with the problems that are solved.",
        "A tree with its rewards and advantages stands in at_offdiag/seed0.",
    )  # fmt: skip
    jobs, fingerprint = side_by_side(setting), setting.fingerprint() + (FOLDER / "start.yaml").read_text()
    return Experiment("rose", tuple(arms), claims, table, fingerprint, curves, jobs, notes, figures(metric, ALPHAS))


def shape_flags(scale: str, name: str) -> list[str]:
    """Flags of an arm's shape of trees at a scale."""
    shape = SHAPES[scale].get(name, {}).items()
    flags = [f"{'--model.rollout.' if key == 'samples' else TREE}{key}={value}" for key, value in shape]
    fixed = STATIC if name in ("fr3e", "spo_chain", "spo_tree") else ()  # which take no part in dynamic sampling
    return [*flags, *fixed]


def _place_arm(
    setting: Setting, name: str, title: str, flags: Sequence[str], main: bool, needs: tuple[str, ...]
) -> Arm:
    def run(context: ArmContext) -> None:
        args = ["test", *setting.flags, *backbone_flags(context), *flags]
        configs = setting.spec.configs(setting.scale)
        cli = ExperimentCLI(setting.spec, args, configs, context.folder, quiet=True, execute=False)
        cli.datamodule.setup("test")
        cli.model.configure_model()
        cli.model.to(cli.trainer.strategy.root_device)
        problems = [*cli.datamodule.splits["test"], *cli.datamodule.splits["val"]]
        metrics, items = look(cli.model, problems, context.seed, context.folder)
        write_results(context.folder, metrics, items)

    return Arm(f"at_{name}", f"branching: {title}", run, main=main, seeded=False, needs=needs)


def _learning_arm(
    setting: Setting, needs: tuple[str, ...], name: str, title: str, flags: Sequence[str], main: bool
) -> Arm:
    def run(context: ArmContext) -> None:
        every = [*flags, *shape_flags(setting.scale, name)]
        train(setting, context, every, extra=lambda cli: {"tokens_drawn": float(cli.model.tokens_drawn)})

    return Arm(name, title, run, main=main, needs=needs)


def _same_tokens_arm(setting: Setting, needs: tuple[str, ...]) -> Arm:
    """GRPO, which draws more tokens an update, for as many tokens as ROSE has drawn."""

    def run(context: ArmContext) -> None:
        tokens = int(read_json(context.of("rose") / "results.json")["metrics"]["tokens_drawn"])
        flags = [*GRPO, f"--model.rollout.token_budget={tokens}"]
        train(setting, context, flags, extra=lambda cli: {"tokens_drawn": float(cli.model.tokens_drawn)})

    return Arm(SAME_TOKENS, "GRPO, tokens of ROSE", run, needs=needs, reads=("rose",))
