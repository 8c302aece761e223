"""Our functions against TRL's, where both have the same convention: its trainers' methods run without a trainer."""

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_core.lm_head import token_log_probs
from lit_rl.functional.advantages import Scale, grpo, rloo
from lit_rl.functional.exploration import entropy, forking_mask
from lit_rl.functional.losses import RatioLevel, Reduction, aggregate, divergence, loss_denominator, policy_loss
from lit_rl.functional.masking import masked_mean

pytest.importorskip("trl")

LONGEST, WEIGHT = 9, 0.1  # most tokens of a response, and what its divergence weighs
EPSILON = 1e-4  # TRL's, added to the deviation of rewards
LENGTHS = (5, 1, 7, 3, 6, 2)


@pytest.fixture(scope="module")
def trainers() -> Any:
    """The modules of TRL's trainers, imported late, as that takes seconds."""
    from trl.trainer import grpo_trainer, rloo_trainer, utils

    return SimpleNamespace(grpo=grpo_trainer.GRPOTrainer, rloo=rloo_trainer.RLOOTrainer, utils=utils)


class Batch:
    """Random log-probabilities, far enough from the old ones that some ratios are clipped."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
        self.old, self.reference, noise = (-2 + 0.4 * torch.randn(self.mask.shape, generator=generator) for _ in "abc")
        self.new = (self.old + 0.5 * (noise + 2)).requires_grad_()
        self.advantages = torch.randn(len(LENGTHS), generator=generator)

    @property
    def by_token(self) -> Tensor:
        return self.advantages[:, None] * self.mask

    def ours(self, level: RatioLevel, reduction: Reduction, low: float, high: float, weight: float) -> Tensor:
        found = policy_loss(self.new, self.old, self.by_token, self.mask, low, high, level=level)
        losses = found.losses + weight * divergence(self.new, self.reference)
        constant = float(len(LENGTHS) * LONGEST)
        return aggregate(losses, self.mask, loss_denominator(self.mask, reduction, constant), reduction)

    def inputs(self) -> dict[str, Tensor]:
        """As TRL's methods take them."""
        responses = self.mask.long()
        found = {"prompt_ids": responses, "prompt_mask": responses, "completion_ids": responses}
        found |= {"completion_mask": responses, "advantages": self.advantages, "num_items_in_batch": responses.sum()}
        found |= {"old_per_token_logps": self.old, "ref_per_token_logps": self.reference}
        return found | {"old_logps": (self.old * self.mask).sum(1)}

    def gradient(self, loss: Tensor) -> Tensor:
        self.new.grad = None
        loss.backward()
        assert self.new.grad is not None
        return self.new.grad.clone()


class Trainer(SimpleNamespace):
    """What TRL's methods ask of their trainer."""

    def __init__(self, log_probs: Tensor, **settings: Any) -> None:
        logged: Any = defaultdict(list)
        once = SimpleNamespace(
            device=torch.device("cpu"), num_processes=1, process_index=0, gather=lambda values: values,
            reduce=lambda values, reduction: values, pad_across_processes=lambda values, **rest: values,
        )  # fmt: skip
        args = SimpleNamespace(
            delta=None, use_bias_correction_kl=False, steps_per_generation=1, gradient_accumulation_steps=1,
            gradient_checkpointing_kwargs=None, per_device_train_batch_size=len(log_probs),
        )  # fmt: skip
        common = {
            "accelerator": once, "args": args, "model": SimpleNamespace(training=True, is_gradient_checkpointing=False),
            "_metrics": {"train": logged}, "logged": logged, "beta": 0.0, "max_completion_length": LONGEST,
            "importance_sampling_level": "token", "top_entropy_quantile": 1.0, "off_policy_mask_threshold": None,
            "use_vllm": False, "_entropy_bonus_enabled": False, "aux_loss_enabled": False, "num_iterations": 1,
            "current_gradient_accumulation_steps": 1, "environment_factories": None, "environments": None, "tools": [],
            "_get_per_token_logps_and_entropies": lambda *rest, **more: (log_probs, log_probs.detach(), None),
        }  # fmt: skip
        super().__init__(**{**common, **settings})


@pytest.mark.parametrize("clip", [(0.2, 0.2, 0.0), (0.1, 0.28, WEIGHT)])
@pytest.mark.parametrize(
    ("kind", "level", "reduction"),
    [
        ("dapo", "token", "token_mean"),
        ("bnpo", "token", "token_mean"),
        ("grpo", "token", "seq_mean_token_mean"),
        ("grpo", "sequence_mean", "seq_mean_token_mean"),  # GSPO
        ("dr_grpo", "token", "const_norm"),
        ("luspo", "sequence_mean", "seq_mean_token_sum"),
    ],
)
def test_losses_and_gradients(
    kind: str, level: RatioLevel, reduction: Reduction, clip: tuple[float, float, float], trainers: Any
) -> None:
    batch, (low, high, weight) = Batch(), clip
    told = "token" if level == "token" else "sequence"
    trainer = Trainer(
        batch.new, loss_type=kind, importance_sampling_level=told, beta=weight, epsilon_low=low, epsilon_high=high
    )
    expected = trainers.grpo._compute_loss(trainer, trainer.model, batch.inputs())
    loss = batch.ours(level, reduction, low, high, weight)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch.gradient(loss), batch.gradient(expected))


def test_what_is_logged_of_a_loss(trainers: Any) -> None:
    """The share of clipped tokens, and the mean of k3."""
    batch = Batch()
    trainer = Trainer(batch.new, loss_type="dapo", beta=WEIGHT, epsilon_low=0.1, epsilon_high=0.28)
    trainers.grpo._compute_loss(trainer, trainer.model, batch.inputs())
    found = policy_loss(batch.new, batch.old, batch.by_token, batch.mask, 0.1, 0.28)
    share = float(masked_mean(found.clipped.float(), batch.mask))
    assert 0 < share < 1
    assert trainer.logged["clip_ratio/region_mean"] == pytest.approx([share])
    k3 = masked_mean(divergence(batch.new, batch.reference), batch.mask)
    assert trainer.logged["kl"] == pytest.approx([float(k3.detach())])


def test_the_ratio_of_whole_responses_of_rloo(trainers: Any) -> None:
    batch = Batch()
    trainer = Trainer(batch.new, epsilon_low=0.6, epsilon_high=2.0)
    expected = trainers.rloo._compute_loss(trainer, trainer.model, batch.inputs())
    loss = batch.ours("sequence_sum", "seq_mean_token_mean", 0.6, 2.0, 0.0)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(batch.gradient(loss), batch.gradient(expected))


REWARDS = (1.0, 0.0, 0.3, 0.7, 0.3, 0.3, 0.3, 0.3, 2.0, -1.5, 0.25, 0.0)  # three groups of four; the second is even
PROMPTS, RESPONSES, TEXTS = ([value] * len(REWARDS) for value in ([1], [2], "a"))


def their_advantages(trainer_class: Any, drawn: tuple[Any, ...], **settings: Any) -> Tensor:
    count = len(REWARDS)
    trainer = Trainer(
        torch.zeros(count, 1), _generate=lambda prompts: drawn, num_generations=4, reward_func_names=["reward"],
        _calculate_rewards=lambda *rest: torch.tensor(REWARDS)[:, None], reward_weights=torch.ones(1),
        _tokenizer=SimpleNamespace(pad_token_id=0), pad_to_multiple_of=None, mask_truncated_completions=False,
        multi_objective_aggregation="sum_then_normalize", _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={}, _pending_metrics={}, reward_clip_range=None, normalize_advantages=False, **settings,
    )  # fmt: skip
    return trainer_class._generate_and_score_completions(trainer, [{"prompt": "a"}] * count)["advantages"]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_of_groups(scale: Scale, trainers: Any) -> None:
    mask, groups = torch.ones(len(REWARDS), 1, dtype=torch.bool), torch.arange(len(REWARDS)) // 4
    found = grpo(torch.tensor(REWARDS), groups, mask, scale, EPSILON)[:, 0]
    drawn: Any = PROMPTS, RESPONSES, None, TEXTS, None, {}, None, []
    expected = their_advantages(trainers.grpo, drawn, scale_rewards=scale)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert found[4:8].tolist() == [0.0] * 4


def test_advantages_against_the_others(trainers: Any) -> None:
    mask, groups = torch.ones(len(REWARDS), 1, dtype=torch.bool), torch.arange(len(REWARDS)) // 4
    found = rloo(torch.tensor(REWARDS), groups, mask)[:, 0]
    expected = their_advantages(trainers.rloo, (PROMPTS, RESPONSES, TEXTS))
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


def test_entropy_and_its_gradient(trainers: Any) -> None:
    logits = (3 * torch.randn(4, 5, 11, generator=torch.Generator().manual_seed(0))).requires_grad_()
    ours, theirs = entropy(logits), trainers.utils.entropy_from_logits(logits)
    torch.testing.assert_close(ours, theirs)
    gradients = [torch.autograd.grad(values.square().sum(), logits)[0] for values in (ours, theirs)]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("fused", [False, True])
def test_log_probs_and_entropy_from_states(fused: bool, trainers: Any) -> None:
    """Against TRL's functions of logits, and its head that forms them in tiles; at a temperature."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(6, 8, generator=generator).requires_grad_()
    weight = torch.randn(40, 8, generator=generator).requires_grad_()
    targets = torch.randint(40, (6,), generator=generator)
    ours = token_log_probs(hidden, weight, targets, entropy=True, temperature=0.7, chunk_logits=100)
    if fused:
        apply = trainers.utils._ChunkedLogProbFunction.apply
        theirs = apply(hidden, weight, None, targets, 0.7, 16, None, 1.0, ("log_probs", "entropy"))[:2]
    else:
        logits = (hidden @ weight.T)[None]
        theirs = trainers.utils.selective_log_softmax_and_entropy(logits, targets[None], temperature=0.7)
    sides = [[ours.log_probs, ours.entropy], [values.flatten() for values in theirs]]
    torch.testing.assert_close(*sides)
    outer = torch.randn(6, generator=generator)
    gradients = [
        torch.autograd.grad((log_probs * outer - 0.3 * entropies).sum(), (hidden, weight))
        for log_probs, entropies in sides
    ]
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-5)


def test_tokens_of_high_entropy(trainers: Any) -> None:
    """A fifth of eleven tokens: TRL's quantile falls on a token, elsewhere it may keep one more or less than we do."""
    entropies = torch.rand(2, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([[8], [3]])
    theirs = trainers.grpo.get_high_entropy_mask(Trainer(entropies), entropies, mask, 0.8)
    assert forking_mask(entropies, mask, 0.2).tolist() == theirs.tolist()
