"""Settings of reinforcement learning, as flags have them."""

from dataclasses import dataclass, field
from typing import Literal

from lit_core.errors import InputError
from lit_core.generation.engine import KV_TOKENS
from lit_rl.functional.exploration import Scale
from lit_rl.functional.losses import Divergence, RatioLevel, Reduction, WeightLevel
from lit_rl.functional.surgery import SurgeryMethod
from lit_rl.modules.granularity import Granularity
from lit_rl.modules.layout import Layout

ExplorationKind = Literal[
    "none", "entropy", "adaptive_entropy", "tre_k", "tre_p", "forking", "kl_cov", "clip_cov", "clip_higher"
]


def at_least(low: float, **values: float | None) -> None:
    """Refuse numbers below a bound; None passes.

    Raises:
        InputError: The first one, by its name.
    """
    for name, value in values.items():
        if value is not None and not value >= low:
            raise InputError(f"must be at least {low}, got {value}", field=name)


@dataclass(frozen=True)
class RolloutConfig:
    """How responses are drawn for training.

    Args:
        samples: Responses a prompt (the size of a group).
        temperature: Divides the logits, in sampling and in training.
        max_tokens: Most tokens of a response.
        top_p: Draw from the most probable tokens up to this mass; below 1 the gradient is biased.
        top_k: Draw from this many most probable tokens; None from all.
        stop_strings: Texts that end a response, besides the end tokens.
        kv_tokens: Most tokens that the cache of the engine holds; the rest waits.
        recompute_log_probs: Compute the old log-probabilities again in the trainer; None does so where the weights are
            not float32, as the engine's then differ by rounding.
        dynamic: Leave out groups whose rewards are all equal and draw further batches until one is full (DAPO).
        most_draws: Batches drawn for one update at most.
        overlong_buffer: The last tokens below ``max_tokens`` in which a response loses reward (DAPO); 0 for none.
        overlong_factor: Reward lost at ``max_tokens``.
        token_budget: End the fit after the update by which so many tokens were drawn, on all ranks; null has no budget.
    """

    samples: int = 8
    temperature: float = 1.0
    max_tokens: int = 512
    top_p: float = 1.0
    top_k: int | None = None
    stop_strings: list[str] = field(default_factory=list)
    kv_tokens: int = KV_TOKENS
    recompute_log_probs: bool | None = None
    dynamic: bool = False
    most_draws: int = 10
    overlong_buffer: int = 0
    overlong_factor: float = 1.0
    token_budget: int | None = None

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, max_tokens=self.max_tokens, most_draws=self.most_draws)
        at_least(1, token_budget=self.token_budget)
        at_least(0, overlong_buffer=self.overlong_buffer)
        if not self.temperature > 0:
            raise InputError(f"must be above 0, got {self.temperature}", field="rollout.temperature")
        if self.dynamic and self.samples < 2:
            raise InputError("leaves out groups of equal rewards: at least 2 samples, got 1", field="rollout.dynamic")


@dataclass(frozen=True)
class EvaluationConfig:
    """How responses are drawn for validation and test.

    Args:
        samples: Responses a prompt; pass@k is estimated for k up to this number.
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Draw from the most probable tokens up to this mass.
        tail_top_k: The tail, whose mass is reported, is what lies outside this many most probable tokens.
        region_top_k: Region whose entropy is reported, by number.
        region_top_p: Region whose size is reported, by mass.
    """

    samples: int = 4
    temperature: float = 1.0
    top_p: float = 1.0
    tail_top_k: int = 20
    region_top_k: int = 2
    region_top_p: float = 0.99

    def __post_init__(self) -> None:
        at_least(1, samples=self.samples, tail_top_k=self.tail_top_k, region_top_k=self.region_top_k)


@dataclass(frozen=True)
class LossConfig:
    """The policy's loss.

    Args:
        clip_low: Lower clip range.
        clip_high: Upper clip range; None as the lower.
        dual_clip: Bound of the loss where the advantage is negative; None for none.
        ratio: Level of the probability ratio: each token, or the sequence by its mean (GSPO) or sum.
        reduction: How tokens become one number; one denominator for all micro-batches of an update, on all ranks.
        constant: Divisor of ``const_norm``; None takes samples in the mini-batch times ``max_tokens``.
        kl_coef: Weight of the divergence from the reference; 0 keeps no reference.
        kl: Its estimate.
        kl_in: In the loss, or subtracted from each token's reward.
        kl_target: Adapt the coefficient towards this divergence, in nats a token; None keeps it.
        kl_horizon: Samples over which it adapts.
        importance: Correct for an engine whose probabilities differ from the trainer's, by token, sequence or the
            sequence's geometric mean; None does not.
        importance_how: Hold the weights within the bounds, or drop what lies outside.
        importance_high: Upper bound.
        importance_low: Lower bound, if any.
    """

    clip_low: float = 0.2
    clip_high: float | None = None
    dual_clip: float | None = None
    ratio: RatioLevel = "token"
    reduction: Reduction = "token_mean"
    constant: float | None = None
    kl_coef: float = 0.0
    kl: Divergence = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = None
    kl_horizon: int = 10_000
    importance: WeightLevel | None = None
    importance_how: Literal["truncate", "mask"] = "truncate"
    importance_high: float = 2.0
    importance_low: float | None = None

    def __post_init__(self) -> None:
        at_least(0, clip_low=self.clip_low, clip_high=self.clip_high, kl_coef=self.kl_coef)
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise InputError(f"must be above 1, got {self.dual_clip}", field="loss.dual_clip")
        if self.kl_in == "loss" and self.kl == "k1" and self.kl_coef > 0:
            raise InputError("k1 has no gradient on average as a loss; use it with kl_in: reward", field="loss.kl")


@dataclass(frozen=True)
class UpdateConfig:
    """How a batch of responses is learned from.

    Args:
        epochs: Passes over it.
        mini_batches: Optimizer steps a pass; the groups are dealt out anew in each.
        micro_tokens: Tokens of one forward pass, padding counted; None takes 2,048 on a CPU and 16,384 on a GPU.
        layout: Length-sorted chunks; prompts shared by their group; a trie, in which responses share their common
            prefixes too; or what promises to be fastest.
    """

    epochs: int = 1
    mini_batches: int = 1
    micro_tokens: int | None = None
    layout: Layout = "auto"

    def __post_init__(self) -> None:
        at_least(1, epochs=self.epochs, mini_batches=self.mini_batches, micro_tokens=self.micro_tokens)


@dataclass(frozen=True)
class SurgeryConfig:
    """How the gradients of several domains become one (MGS card, sections 2, 5 and 10).

    Args:
        granularity: What surgery treats as one module: each parameter, as the authors' code does; a linear layer; the
            attention or the feed-forward part of a layer, as the paper's text has it; a layer; everything (PCGrad).
        method: ``pcgrad`` takes from each gradient what points against another; ``gradvac``, ``cagrad`` and ``mgda``
            are other ways; ``sum`` is mixed training.
        compat: Take gradients with a squared norm of at most 1e-12 as none, as the authors' code does, instead of those
            that small beside the other domains'.
        weighting: Domains count by their share of the batch, or each as much as any other.
        order: In which order a domain meets the others: drawn anew for each module and step, or by name.
        radius: c of ``cagrad``.
        decay: Share of the last cosine in the running means of ``gradvac``.
        domains: Their names; empty takes those of the problems, as they come up.
    """

    granularity: Granularity = "param"
    method: SurgeryMethod = "pcgrad"
    compat: bool = False
    weighting: Literal["share", "per_domain_mean"] = "share"
    order: Literal["random", "fixed"] = "random"
    radius: float = 0.5
    decay: float = 0.5
    domains: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        at_least(0, radius=self.radius, decay=self.decay)
        if self.decay > 1:
            raise InputError(f"must be at most 1, got {self.decay}", field="surgery.decay")
        if len(set(self.domains)) < len(self.domains):
            raise InputError(f"names must differ, got {self.domains}", field="surgery.domains")


@dataclass(frozen=True)
class CriticConfig:
    """The value function of PPO.

    Args:
        kind: A backbone of its own, or a head on the policy's states.
        lr: Its learning rate.
        clip: How far a value may move from that of the rollout; None does not hold it.
        coefficient: Weight of its loss.
        warmup: Steps in which it alone learns.
    """

    kind: Literal["separate", "head"] = "separate"
    lr: float = 1e-5
    clip: float | None = 0.5
    coefficient: float = 1.0
    warmup: int = 0

    def __post_init__(self) -> None:
        at_least(0, lr=self.lr, clip=self.clip, coefficient=self.coefficient, warmup=self.warmup)


@dataclass(frozen=True)
class ExplorationConfig:
    """What keeps the policy exploring (TRE card, sections 2 and 5).

    Args:
        kind: ``entropy`` over the whole vocabulary, with a fixed or an adapted coefficient; ``tre_k`` or ``tre_p``, the
            entropy over the most probable tokens by number or by mass; ``forking``, the loss on the tokens of highest
            entropy alone; ``kl_cov`` and ``clip_cov``, which hold back tokens of high covariance; ``clip_higher``.
        coefficient: Weight of the entropy. (The penalty of ``kl_cov`` has its authors' weight of 1.)
        top_k: Region of ``tre_k``.
        top_p: Region of ``tre_p``.
        scale: Bring the entropy of a region to the range of the full one, or not.
        cap: Most tokens of a region by mass; null has no such bound.
        mass_preserving: Take out of the gradient what would move the region's mass.
        target: Entropy that ``adaptive_entropy`` aims at, in nats a token.
        adapt: Change of its coefficient at each update.
        share: Share of the tokens that ``forking`` keeps.
        cov_percent: Share of the tokens that ``kl_cov`` holds, in percent.
        cov_ratio: Share of the tokens that ``clip_cov`` takes out.
        cov_low: Lower bound of their covariance.
        cov_high: Upper bound.
        scope: Whether shares and means of the last three are taken over a micro-batch, as their authors do, or over
            the mini-batch, which costs a further forward pass.
        clip_high: Upper clip range of ``clip_higher``.
    """

    kind: ExplorationKind = "none"
    coefficient: float = 0.001
    top_k: int = 2
    top_p: float = 0.99
    scale: Scale = "logV_over_logS"
    cap: int | None = 256
    mass_preserving: bool = False
    target: float = 0.2
    adapt: float = 0.005
    share: float = 0.2
    cov_percent: float = 0.2
    cov_ratio: float = 2e-4
    cov_low: float = 1.0
    cov_high: float = 5.0
    scope: Literal["micro", "batch"] = "batch"
    clip_high: float = 0.28

    def __post_init__(self) -> None:
        at_least(0, coefficient=self.coefficient, adapt=self.adapt, cov_percent=self.cov_percent)
        if not 0 < self.top_p <= 1 or not 0 < self.share <= 1:
            raise InputError(f"top_p and share lie in (0, 1], got {self.top_p} and {self.share}", field="exploration")
        if self.top_k < 1 or (self.cap or 1) < 1:
            raise InputError(f"top_k and cap must be at least 1, got {self.top_k} and {self.cap}", field="exploration")
