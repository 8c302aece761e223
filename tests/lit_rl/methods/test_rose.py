"""ROSE as a method: estimators in their place, fits with every sampler, resuming, presets, refusals."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from policy_worker import ROLLOUT, Logged, SaveAt, build, fit, weights

from lit_core.errors import InputError
from lit_rl.functional.tree_advantages import rose
from lit_rl.methods import rose as rose_method
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.rose import ESTIMATORS, ROSE
from lit_rl.modules.config import LossConfig, RolloutConfig
from lit_rl.modules.trees.collect import collect_trees
from lit_rl.modules.trees.config import TreeConfig
from lit_rl.modules.trees.scores import unit_embeddings

PRESETS = Path(__file__).parents[3] / "experiments" / "rose" / "presets"
EIGHT = replace(ROLLOUT, samples=8)
SAMPLERS: dict[str, dict[str, Any]] = {
    "branching": {},
    "tree_rl": {},
    "tree_grpo": {},
    "tree_po": {"segment": 3},
    "spo_tree": {"segment": 3, "factors": (2, 2, 2)},
    "spo_chain": {"every": 2},
    "fr3e": {"chains": 4, "points": 1, "children": 4},
}
slow = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lightning 2.6 calls what jsonargparse 5 drops
]
pytestmark = slow


def made(tree: TreeConfig | None = None, **settings: Any) -> Any:
    given = {"rollout": EIGHT, "tree": tree or TreeConfig(), "loss": LossConfig(reduction="const_norm"), **settings}
    return build(ROSE, **given)


def changed(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return any(not torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_learns(sampler: str, tmp_path: Path) -> None:
    module = made(TreeConfig(sampler=sampler, **SAMPLERS[sampler]))  # type: ignore[arg-type]
    module.configure_model()
    before, logged = weights(module), Logged()
    fit(module, tmp_path, 2, logged)
    assert changed(before, weights(module))
    assert logged.rows[-1]["rollout/tokens_total"] == module.tokens_drawn > 0


def test_independent_responses_without_a_penalty_are_dr_grpo(tmp_path: Path) -> None:
    loss = LossConfig(reduction="const_norm")
    restarts = made(TreeConfig(epsilon=1.0), length_penalty=0.0)
    flat = made(TreeConfig(sampler="independent"), estimator="dr_grpo")
    grpo = build(GRPO, scale="none", loss=loss, rollout=EIGHT)
    for module in (restarts, flat, grpo):
        fit(module, tmp_path, 2)
    for name, value in weights(grpo).items():
        torch.testing.assert_close(weights(flat)[name], value, atol=0, rtol=0)
        torch.testing.assert_close(weights(restarts)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("layout", ["sorted", "shared", "trie"])
def test_layouts_give_the_same_weights(layout: str, tmp_path: Path) -> None:
    """With a penalty responses that share tokens disagree on them, and with KL every token counts."""
    from lit_rl.modules.config import UpdateConfig

    loss = LossConfig(reduction="const_norm", kl_coef=0.05)
    fits = [made(loss=loss, update=UpdateConfig(layout=name, epochs=2)) for name in ("sorted", layout)]  # type: ignore[arg-type]
    for module in fits:
        fit(module, tmp_path, 2)
    for name, value in weights(fits[0]).items():
        torch.testing.assert_close(weights(fits[1])[name], value, atol=2e-6, rtol=0)


@pytest.mark.parametrize("estimator", ["segments", *ESTIMATORS, "tree_rl"])
def test_estimators_are_those_of_the_functions(estimator: str, tmp_path: Path) -> None:
    module = made(estimator=estimator)
    seen = []
    learn = module._learn
    module._learn = lambda experience, totals: (seen.append(experience), learn(experience, totals))
    drawn = []
    collect = module.collect
    module.collect = lambda *given: drawn.append(collect(*given)) or drawn[-1]
    fit(module, tmp_path, 1)
    rollout, advantages = drawn[0], seen[0].advantages
    assert advantages.shape == rollout.mask.shape
    assert (advantages[~rollout.mask] == 0).all()
    if estimator == "segments":
        expected = rose(rollout.forest, rollout.scores, rollout.mask, 1.0)
        assert torch.equal(advantages, expected)
    equal = [
        (rollout.group_ids == group).nonzero().flatten()
        for group in rollout.group_ids.unique()
        if len(rollout.scores[rollout.group_ids == group].unique()) == 1
    ]
    if not estimator.startswith("tree_po"):  # whitening shifts groups without a signal
        assert all((advantages[rows] == 0).all() for rows in equal)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_resumed_fit_ends_with_the_same_weights(frozen: bool, tmp_path: Path) -> None:
    path = tmp_path / "half.ckpt"
    tree = TreeConfig(freeze_embeddings=frozen)
    whole, again = made(tree), made(tree)
    fit(whole, tmp_path, 4, SaveAt(path, 2))
    fit(again, tmp_path, 4, ckpt=path)
    assert again.tokens_drawn == whole.tokens_drawn
    for name, value in weights(whole).items():
        torch.testing.assert_close(weights(again)[name], value, atol=0, rtol=0)
    if frozen:
        assert torch.equal(whole.table, again.table)


def test_the_embeddings_are_those_of_each_rollout_or_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tables: list[torch.Tensor] = []

    def seen(*given: Any) -> Any:
        tables.append(given[7].clone())
        return collect_trees(*given)

    monkeypatch.setattr(rose_method, "collect_trees", seen)
    for frozen in (False, True):
        module = made(TreeConfig(freeze_embeddings=frozen))
        module.configure_model()
        first = unit_embeddings(module.policy.model)
        tables.clear()
        fit(module, tmp_path, 3)
        assert [torch.equal(table, first) for table in tables] == [True, frozen, frozen]
        assert (module.table is not None) == frozen


def test_dynamic_sampling_takes_whole_trees(tmp_path: Path) -> None:
    module = made(rollout=replace(EIGHT, dynamic=True, most_draws=4))
    seen = []
    learn = module._learn
    module._learn = lambda experience, totals: (seen.append(experience), learn(experience, totals))
    fit(module, tmp_path, 2)
    assert all(experience.advantages.any(1).sum() > 0 for experience in seen)


def test_a_fit_ends_with_its_tokens(tmp_path: Path) -> None:
    module = made(rollout=replace(EIGHT, token_budget=300))
    logged = Logged()
    run = fit(module, tmp_path, 50, logged)
    assert run.global_step < 50
    totals = [row["rollout/tokens_total"] for row in logged.rows]
    assert totals[-2] < 300 <= totals[-1] == module.tokens_drawn


def test_rewards_outside_of_the_unit_interval_are_refused(tmp_path: Path) -> None:
    module = made(rollout=replace(EIGHT, overlong_buffer=6, overlong_factor=3.0))
    with pytest.raises(InputError, match=r"length_penalty.*a length penalty needs rewards in \[0, 1\], got -"):
        fit(module, tmp_path, 3)
    fit(made(rollout=replace(EIGHT, overlong_buffer=6, overlong_factor=3.0), length_penalty=0.0), tmp_path, 1)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"length_penalty": -0.5}, r"length_penalty': must be at least 0, got -0.5"),
        ({"rollout": RolloutConfig(samples=1)}, r"rollout.samples': a tree needs at least 2 responses a prompt, got 1"),
        ({"loss": LossConfig(kl_coef=0.1, kl="k1", kl_in="reward")}, r"a length penalty needs rewards in \[0, 1\]"),
        (
            {"tree": TreeConfig(sampler="fr3e"), "rollout": replace(EIGHT, dynamic=True)},
            r"rollout.dynamic': fr3e makes groups of different sizes",
        ),
        ({"tree": TreeConfig(sampler="tree_rl", chains=3)}, r"tree_rl makes 12 responses a prompt, got 8"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        made(settings.pop("tree", None), **settings)


def test_the_presets_differ_where_the_card_says_so() -> None:
    """Entropy over the top tokens, a stale table, no penalty, dual clip, recomputed log-probabilities, epochs."""

    def flat(values: Any, name: str = "") -> dict[str, Any]:
        if not isinstance(values, dict):
            return {name: values}
        return {k: v for key, value in values.items() for k, v in flat(value, f"{name}.{key}").items()}

    paper, code = (flat(yaml.safe_load((PRESETS / f"rose_{name}.yaml").read_text())) for name in ("paper", "code"))
    assert set(paper) == set(code)
    differing = {name: (paper[name], code[name]) for name in paper if paper[name] != code[name]}
    assert differing == {
        ".model.tree.entropy_support": ("full", "topk"),
        ".model.tree.freeze_embeddings": (False, True),
        ".model.length_penalty": (1.0, 0.0),
        ".model.loss.dual_clip": (None, 3.0),
        ".model.rollout.recompute_log_probs": (None, True),
        ".trainer.max_epochs": (8, 10),
    }
    assert paper[".model.tree.variant"] == "offdiag"
    assert (paper[".model.tree.top_k"], paper[".model.tree.epsilon"]) == (20, 0.5)
