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
GRPO = (*FLAT, "--model.estimator=grpo", "--model.loss.reduction=seq_mean_token_mean")
DAPO = (*FLAT, "--model.estimator=grpo", "--model.loss.reduction=token_mean", "--model.loss.clip_high=0.28")
DYNAMIC = ("--model.rollout.dynamic=true",)
FOLDER = Path(__file__).parent
SCORES = {  # of the first part: title and flags
    "random": ("anywhere", (f"{TREE}score=random",)),
    "min_probability": ("least probable token", (f"{TREE}score=min_probability",)),
    "entropy": ("entropy", (f"{TREE}score=entropy",)),
    "divergence": ("divergence", (f"{TREE}score=divergence",)),
    "offdiag": ("semantic entropy", ()),
    "rao": ("semantic entropy, rao", (f"{TREE}variant=rao",)),
    "allpairs": ("semantic entropy, all pairs", (f"{TREE}variant=allpairs",)),
}
LEARNING = (  # name, title, flags, whether it is run by default
    ("grpo", "GRPO", GRPO, True),
    ("dr_grpo", "Dr. GRPO", (*FLAT, "--model.estimator=dr_grpo"), True),
    ("entropy_tree", "entropy tree", (f"{TREE}score=entropy",), True),
    ("rose", "ROSE", (), True),
    ("rose_rao", "ROSE, rao", (f"{TREE}variant=rao",), False),
    ("dapo", "DAPO", (*DAPO, *DYNAMIC), False),
    ("rose_dynamic", "ROSE, dynamic sampling", DYNAMIC, False),
    ("fr3e", "FR3E", (f"{TREE}sampler=fr3e", f"{TREE}chains=4", f"{TREE}points=1", f"{TREE}children=4",
                      "--model.loss.reduction=token_mean", "--model.loss.clip_high=0.3"), False),
    ("tree_po", "TreePO", (f"{TREE}sampler=tree_po", f"{TREE}segment=12", "--model.estimator=tree_po",
                           "--model.loss.reduction=token_mean", "--model.loss.clip_high=0.28"), False),
    ("tree_rl", "TreeRL", (f"{TREE}sampler=tree_rl", "--model.estimator=tree_rl"), False),
    ("spo_tree", "SPO-tree", (f"{TREE}sampler=spo_tree", f"{TREE}segment=10", f"{TREE}factors=[2,2,2]",
                              "--model.estimator=spo_tree"), False),
    ("spo_chain", "SPO-chain", (f"{TREE}sampler=spo_chain", f"{TREE}children=2", "--model.rollout.samples=2"), False),
    ("tree_grpo", "Tree-GRPO", (f"{TREE}sampler=tree_grpo", "--model.estimator=tree_grpo"), False),
    ("random_tree", "random tree", (f"{TREE}score=random",), False),
    ("divergence_tree", "divergence tree", (f"{TREE}score=divergence",), False),
    ("whole_responses", "ROSE's trees, credit of Dr. GRPO", ("--model.estimator=dr_grpo",), False),
    ("epsilon_0", "ROSE, epsilon 0", (f"{TREE}epsilon=0",), False),
    ("alpha_0", "ROSE, alpha 0", ("--model.length_penalty=0",), False),
    ("alpha_3", "ROSE, alpha 3", ("--model.length_penalty=3",), False),
)  # fmt: skip
SAME_TOKENS = "rose_tokens"
ALPHAS = {0.0: "alpha_0", 1.0: "rose", 3.0: "alpha_3"}  # the third part


def build(setting: Setting) -> Experiment:
    """The arms and claims at a scale."""
    needs = (START,) if needs_start(setting) else ()
    warm = [f"--config={FOLDER / 'start.yaml'}"] if setting.scale == "tiny" else ["--data.task=countdown_steps"]
    arms: list[Arm] = [start_arm(setting, warm=warm)] if needs else []
    arms += [_place_arm(setting, name, title, flags, needs) for name, (title, flags) in SCORES.items()]
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
        Claim("ROSE solves more than GRPO, as many tokens", solved, SAME_TOKENS, "grpo"),
        Claim("ROSE solves more than Dr. GRPO", solved, "rose", "dr_grpo"),
        Claim("ROSE solves more than entropy trees", solved, "rose", "entropy_tree"),
        Claim("ROSE covers more than GRPO, as many responses", metric, "rose", "grpo"),
        Claim("ROSE covers more than GRPO, as many tokens", metric, SAME_TOKENS, "grpo"),
        Claim("ROSE covers more than entropy trees", metric, "rose", "entropy_tree"),
        Claim("The length penalty shortens correct responses", "correct_length", "rose", "alpha_0", False),
        Claim("A larger one shortens them more", "correct_length", "alpha_3", "rose", False),
        Claim("The segment estimator helps", solved, "rose", "whole_responses"),
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
        "Every learning arm has the start, problems, responses a prompt, learning rate, steps and clipping of the "
        f"others, where its method does not say otherwise; '{SAME_TOKENS}' goes on until it has drawn GRPO's tokens.",
        "A tree with its rewards and advantages stands in at_offdiag/seed0.",
    )  # fmt: skip
    jobs, fingerprint = side_by_side(setting), setting.fingerprint() + (FOLDER / "start.yaml").read_text()
    return Experiment("rose", tuple(arms), claims, table, fingerprint, curves, jobs, notes, figures(metric, ALPHAS))


def _place_arm(setting: Setting, name: str, title: str, flags: Sequence[str], needs: tuple[str, ...]) -> Arm:
    def run(context: ArmContext) -> None:
        args = ["test", *setting.flags, *backbone_flags(context), *flags]
        configs = setting.spec.configs(setting.scale)
        cli = ExperimentCLI(setting.spec, args, configs, context.folder, quiet=True, execute=False)
        cli.datamodule.setup("test")
        cli.model.configure_model()
        problems = [*cli.datamodule.splits["test"], *cli.datamodule.splits["val"]]
        metrics, items = look(cli.model, problems, context.seed, context.folder)
        write_results(context.folder, metrics, items)

    return Arm(f"at_{name}", f"branching: {title}", run, seeded=False, needs=needs)


def _learning_arm(
    setting: Setting, needs: tuple[str, ...], name: str, title: str, flags: Sequence[str], main: bool
) -> Arm:
    def run(context: ArmContext) -> None:
        train(setting, context, flags, extra=lambda cli: {"tokens_drawn": float(cli.model.tokens_drawn)})

    return Arm(name, title, run, main=main, needs=needs)


def _same_tokens_arm(setting: Setting, needs: tuple[str, ...]) -> Arm:
    def run(context: ArmContext) -> None:
        tokens = int(read_json(context.of("grpo") / "results.json")["metrics"]["tokens_drawn"])
        flags = [f"--model.rollout.token_budget={tokens}", "--trainer.max_steps=-1", "--trainer.max_epochs=-1"]
        train(setting, context, flags, extra=lambda cli: {"tokens_drawn": float(cli.model.tokens_drawn)})

    return Arm(SAME_TOKENS, "ROSE, tokens of GRPO", run, needs=(*needs, "grpo"))
