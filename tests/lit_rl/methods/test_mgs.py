"""MGS beside GRPO: the same gradients by domain, surgery in its place, logs, maps, resuming, refusals."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import policy_worker as worker
import pytest
import torch
from policy_worker import Logged, SaveAt, build, fit, weights
from torch import Tensor
from update_in_loops import prepared, rollout

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_rl.callbacks.interference import CONFLICTS, ConflictMap, InterferenceMap
from lit_rl.functional.surgery import draw_orders
from lit_rl.methods.grpo import GRPO
from lit_rl.methods.mgs import MGS
from lit_rl.modules.config import ExplorationConfig, LossConfig, SurgeryConfig, UpdateConfig
from lit_rl.modules.granularity import Part
from lit_rl.modules.rollouts import Rollout
from lit_rl.modules.surgery import GradientSurgery
from lit_rl.problems import Problem

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # lightning 2.6 calls what jsonargparse 5 drops
]
KL = LossConfig(reduction="seq_mean_token_mean", kl_coef=0.3)
PLAIN = ExplorationConfig()


def given(domains: Sequence[str] = "aba", rows: Sequence[int] | None = None) -> Rollout:
    """The rollout of the other tests, a domain for each of its three groups."""
    found = rollout()
    found.problems = [Problem(row, "", "", domain=domains[group]) for row, group in enumerate(found.sequences.groups)]
    return found if rows is None else found.take(rows)


def one_step(method: Any, folder: Path, drawn: Rollout, loss: LossConfig = KL, **settings: Any) -> Any:
    """A method after one update, with what it stepped by and, with surgery, the gradients of its domains."""
    module = prepared(build(method, **{"loss": loss, "exploration": PLAIN, **settings}))
    finish, module.seen = GradientSurgery.finish, {}

    def recorded(engine: GradientSurgery, seed: int) -> None:
        for number, name in enumerate(engine.gradients.domains):
            kept = zip(engine.split.parameters, engine.gradients.kept[number], strict=True)
            module.seen[name] = [(torch.zeros_like(p) if g is None else g.clone()).flatten() for p, g in kept]
        module.seed = seed
        finish(engine, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GradientSurgery, "finish", recorded)
        run = worker.fit_fixed(module, drawn, folder)
    module.logged = {name: float(value) for name, value in run.callback_metrics.items()}
    (record,) = run.optimizers[0].records  # type: ignore[attr-defined]
    by_parameter = {id(parameter): gradient for parameter, _, gradient in record}
    module.gradients = [
        by_parameter[id(parameter)].flatten() for parameter in module.policy.parameters() if parameter.requires_grad
    ]
    return module


def close(found: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 1e-6) -> None:
    one, other = torch.cat(list(found)), torch.cat(list(expected))
    assert float((one - other).norm()) <= tolerance * float(other.norm())


@pytest.mark.parametrize("reduction", ["seq_mean_token_mean", "token_mean", "const_norm"])
def test_the_domains_add_up_to_the_mixed_gradient(reduction: Any, tmp_path: Path) -> None:
    """Whatever the chunks; the steps differ by surgery alone."""
    loss, chunks = replace(KL, reduction=reduction), UpdateConfig(micro_tokens=20)
    grpo = one_step(GRPO, tmp_path, given(), loss)
    mgs = one_step(MGS, tmp_path, given(), loss, update=chunks)
    assert list(mgs.seen) == ["a", "b"]
    close([a + b for a, b in zip(mgs.seen["a"], mgs.seen["b"], strict=True)], grpo.gradients)
    assert mgs.logged["policy/loss"] == pytest.approx(grpo.logged["policy/loss"], rel=1e-5)
    expected = []
    for a, b in zip(mgs.seen["a"], mgs.seen["b"], strict=True):
        dot = (a.double() @ b.double()).clamp(max=0)
        squares = [part.double().square().sum() for part in (a, b)]
        expected.append((a - dot / squares[1] * b + b - dot / squares[0] * a).float())
    close(mgs.gradients, expected)
    assert float((torch.cat(mgs.gradients) - torch.cat(grpo.gradients)).norm()) > 1e-3


def test_three_domains_are_projected_in_the_order_drawn(tmp_path: Path) -> None:
    mgs = one_step(MGS, tmp_path, given("abc"))
    orders = draw_orders(mgs.seed, len(mgs.gradients), 3)
    expected = []
    for number, rows in enumerate(zip(*mgs.seen.values(), strict=True)):
        total = torch.zeros_like(rows[0]).double()
        for own, others in enumerate(orders[number].tolist()):
            left = rows[own].double()
            for other in others:
                dot = left @ rows[other].double()
                left = left - dot.clamp(max=0) / (rows[other].double() @ rows[other].double()) * rows[other].double()
            total += left
        expected.append(total.float())
    close(mgs.gradients, expected)


def test_the_sum_is_grpo_to_the_last_bit(tmp_path: Path) -> None:
    """Where GRPO reads the same micro-batches."""
    whole = one_step(MGS, tmp_path, given(), surgery=SurgeryConfig(method="sum"))

    class ByDomain(GRPO):
        def form_gradient(self, *args: Any) -> Tensor:
            chunks = self.passes.chunks
            self.passes.chunks = lambda sequences, rows, device: [  # type: ignore[method-assign]
                chunk
                for groups in ((0, 2), (1,))
                for chunk in chunks(sequences, [row for row in rows if sequences.groups[row] in groups], device)
            ]
            return super().form_gradient(*args)

    grpo = one_step(ByDomain, tmp_path, given())
    for name, value in weights(grpo).items():
        assert torch.equal(weights(whole)[name], value), name
    assert whole.logged["surgery/magnitude"] == 0


def test_one_domain_is_grpo_and_says_so(tmp_path: Path) -> None:
    grpo = one_step(GRPO, tmp_path, given())
    with pytest.warns(UserWarning, match="all problems are of one domain, 'a'") as told:
        mgs = one_step(MGS, tmp_path, given("aaa"), update=UpdateConfig(epochs=1))
    assert sum("one domain" in str(warning.message) for warning in told) == 1
    for name, value in weights(grpo).items():
        assert torch.equal(weights(mgs)[name], value)
    assert not any(name.startswith("surgery") for name in mgs.logged)


@pytest.mark.parametrize("reduction", ["seq_mean_token_mean", "token_mean", "const_norm"])
def test_domains_that_count_alike(reduction: Any, tmp_path: Path) -> None:
    """Each as if it were the whole batch, and then the mean of them."""
    loss = replace(KL, reduction=reduction)
    drawn = given()
    mgs = one_step(MGS, tmp_path, drawn, loss, surgery=SurgeryConfig(weighting="per_domain_mean"))
    for name in "ab":
        rows = [row for row, problem in enumerate(drawn.problems) if problem.domain == name]
        alone = one_step(GRPO, tmp_path, given(rows=rows), loss)
        close([2 * part for part in mgs.seen[name]], alone.gradients)


def test_a_named_domain_that_is_absent_changes_nothing(tmp_path: Path) -> None:
    two = one_step(MGS, tmp_path, given())
    for weighting in ("share", "per_domain_mean"):
        named = SurgeryConfig(domains=["b", "c", "a"], weighting=weighting)  # type: ignore[arg-type]
        three = one_step(MGS, tmp_path, given(), surgery=named)
        assert list(three.seen) == ["b", "c", "a"]
        assert not any(part.any() for part in three.seen["c"])
        if weighting == "share":
            close(three.gradients, two.gradients)
    with pytest.raises(InputError, match="does not list the domain 'b'"):
        one_step(MGS, tmp_path, given(), surgery=SurgeryConfig(domains=["a", "c"]))


@pytest.mark.parametrize(
    "settings",
    [
        {"lora": Lora(r=4), "surgery": SurgeryConfig("linear")},
        {"loading": BackboneConfig(gradient_checkpointing=True), "surgery": SurgeryConfig("block", "cagrad")},
        {"loading": BackboneConfig(dtype="bfloat16"), "surgery": SurgeryConfig("layer", "mgda")},
        {"exploration": ExplorationConfig(kind="forking"), "surgery": SurgeryConfig(weighting="per_domain_mean")},
    ],
)
def test_other_weights_and_losses(settings: dict[str, Any], tmp_path: Path) -> None:
    mgs = one_step(MGS, tmp_path, given("abc"), update=UpdateConfig(micro_tokens=20), **settings)
    assert all(part.dtype == torch.float32 for parts in mgs.seen.values() for part in parts)
    assert torch.cat(mgs.gradients).isfinite().all()
    plain = one_step(MGS, tmp_path, given("abc"), **settings)
    tolerance = 0.05 if "loading" in settings and settings["loading"].dtype == "bfloat16" else 1e-5
    close(mgs.gradients, plain.gradients, tolerance)


def test_what_is_not_finite_is_left_out(tmp_path: Path) -> None:
    drawn = given()
    drawn.scores[1] = torch.nan
    module = build(MGS, loss=KL, optimizer=worker.adam)
    module.configure_model()
    before = weights(module)
    with pytest.warns(UserWarning, match="its gradient is not finite"):
        worker.fit_fixed(module, drawn, tmp_path)
    assert module.skipped == 1
    for name, value in weights(module).items():
        assert torch.equal(value, before[name])


def test_a_fit_logs_domains_and_draws_maps(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import TensorBoardLogger
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged = Logged()
    module = build(MGS, loss=KL, rollout=replace(worker.ROLLOUT, max_tokens=5))
    logger = TensorBoardLogger(tmp_path, "", "")
    fit(module, tmp_path, 4, logged, InterferenceMap(tmp_path, 2), logger=logger, log_every_n_steps=1)
    last = logged.rows[-1]
    for name in worker.DOMAINS:
        assert f"surgery/gain/{name}" in last
        assert last[f"surgery/norm/{name}"] > 0
        assert f"rollout/{name}/reward_mean" in last
        assert 0 < last[f"rollout/{name}/length_mean"] <= 5
        assert last[f"rollout/{name}/entropy"] > 0
    shares = [last[f"rollout/{name}/share"] for name in worker.DOMAINS]
    assert all(0 < share < 1 for share in shares)
    for name in ("conflict_ratio", "conflict_ratio_weighted", "conflict_ratio/attention", "conflict_ratio/mlp"):
        assert 0 < last[f"surgery/{name}"] < 1
    assert last["surgery/magnitude"] > 0
    assert {"surgery/cosine", "surgery/cosine/chat-math", "surgery/cosine/norm"} <= last.keys()
    assert sorted(path.name for path in tmp_path.glob("*.png")) == ["interference.2.png", "interference.4.png"]
    events = EventAccumulator(str(tmp_path), {"images": 0})
    events.Reload()
    assert [image.step for image in events.Images("surgery/conflicts")] == [2, 4]
    assert json.loads((tmp_path / CONFLICTS).read_text())["steps"] == 4


def test_a_map_goes_on_after_a_kill_and_ends_with_the_run(tmp_path: Path) -> None:
    (tmp_path / "whole").mkdir()
    half = tmp_path / "half.ckpt"
    whole, again = (build(MGS, loss=KL) for _ in range(2))
    fit(whole, tmp_path, 3, InterferenceMap(tmp_path / "whole", 50), SaveAt(half, 2))
    assert [path.name for path in (tmp_path / "whole").glob("*.png")] == ["interference.3.png"]
    fit(again, tmp_path, 3, InterferenceMap(tmp_path, 50), ckpt=half)
    assert (tmp_path / CONFLICTS).read_text() == (tmp_path / "whole" / CONFLICTS).read_text()


def test_cells_of_a_map() -> None:
    parts = tuple(
        Part(name, layer, place, kind, 1)  # type: ignore[arg-type]
        for name, layer, place, kind in (
            ("embed", None, "embed", "embedding"), ("0.a", 0, "a", "attention"), ("0.m", 0, "m", "mlp"),
            ("1.a", 1, "a", "attention"), ("norm", None, "norm", "norm"),
        )
    )  # fmt: skip
    first = ConflictMap.of(parts, [0.1, 0.2, 0.3, 0.4, 0.5], ("x", "y"), 7)
    assert first.rows == ["layer 0", "layer 1", "outside"]
    assert first.columns == ["a", "m", "embedding", "norm"]
    assert [[value for value in row if value == value] for row in first.values] == [[0.2, 0.3], [0.4], [0.1, 0.5]]
    second = ConflictMap.of(parts, [0.3, 0.4, 0.5, 0.6, 0.7], ("x", "y"), 7)
    both = ConflictMap.mean([first.content(), json.loads(json.dumps(second.content()))])
    assert both.values[1][0] == pytest.approx(0.5)
    assert both.values[0][2] != both.values[0][2]
    assert (both.rows, both.domains, both.steps) == (first.rows, ["x", "y"], 7)


def test_a_resumed_fit_ends_with_the_same_weights(tmp_path: Path) -> None:
    """With the running means of GradVac, and the domains in their order."""
    path = tmp_path / "half.ckpt"
    whole, again = (build(MGS, loss=KL, surgery=SurgeryConfig("block", "gradvac")) for _ in range(2))
    fit(whole, tmp_path, 4, SaveAt(path, 2))
    fit(again, tmp_path, 4, ckpt=path)
    assert again.domains == whole.domains
    assert torch.equal(again._engine.cosines, whole._engine.cosines)
    for name, value in weights(whole).items():
        assert torch.equal(weights(again)[name], value)


def test_settings_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="GRPO's estimator"):
        build(MGS, normalisation="domain", estimator="rloo")
    with pytest.raises(InputError, match="no mean over a domain"):
        build(
            MGS,
            loss=LossConfig(reduction="const_norm", constant=9.0),
            surgery=SurgeryConfig(weighting="per_domain_mean"),
        )
    with pytest.raises(InputError, match="names must differ"):
        SurgeryConfig(domains=["a", "a"])
    with pytest.raises(InputError, match="at most 1"):
        SurgeryConfig(decay=1.5)
