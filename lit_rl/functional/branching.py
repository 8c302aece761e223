"""Where a rollout branches: entropy, semantic divergence and their product at each position (ROSE card, 2.1).

Logits are those of the model at temperature 1, whatever the temperature at which tokens are drawn; entropies are in
nats, and nothing here carries a gradient. No sentence is embedded: the divergence is that of the rows of the token
embedding table.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

Variant = Literal["offdiag", "allpairs", "rao"]
EntropySupport = Literal["full", "topk"]
CHUNK = 1 << 26  # logits that a GPU works on at a time: 256 MiB, so that few operations are started
CPU_CHUNK = 1 << 22  # logits that are made float32 at a time
BLOCK = 4  # columns of which one is the largest, as measured
LOWEST = -1e4  # stands for minus infinity, so that 0 log 0 = 0


class BranchingScores(NamedTuple):
    """Scores of each position, float32 ``(...)``; ``semantic_entropy`` is the product of the other two."""

    entropy: Tensor
    divergence: Tensor
    semantic_entropy: Tensor


class _Table(NamedTuple):
    """Token embeddings ``(V, D)``, and what brings each to length 1, ``(V)``, or None where they have it."""

    embeddings: Tensor
    scales: Tensor | None


def branching_scores(
    logits: Tensor,
    embeddings: Tensor,
    top_k: int = 20,
    variant: Variant = "offdiag",
    entropy_support: EntropySupport = "full",
    sampled: Tensor | None = None,
    normalised: bool = False,
) -> BranchingScores:
    """All scores of each position in one pass (eqs. 1-3), without the embeddings of every position's candidates.

    The divergence is that of the ``top_k`` most probable tokens, whose probabilities are not renormalised. With
    ``y`` the sum of ``p`` times the unit embedding over them, ``offdiag`` is the sum of ``p**2`` less ``|y|**2``
    (pairs of different tokens, as the authors' code has it), ``allpairs`` is ``-|y|**2`` (the equation read
    literally), and ``rao`` is the square of the sum of ``p`` less ``|y|**2``, which is never negative. The first two
    favour positions without a choice where embeddings resemble each other; see :func:`mean_cosine`.

    Args:
        logits: ``(..., V)``.
        embeddings: Token embeddings ``(V, D)``.
        top_k: How many tokens are compared.
        variant: See above.
        entropy_support: Sum the entropy over the vocabulary, or over the top tokens and the one that was drawn, as
            the authors' code does.
        sampled: Token that was drawn at each position, Long ``(...)``; counts with ``topk`` where it is outside.
        normalised: The embeddings have length 1 already; saves a pass over the table.

    Raises:
        ValueError: ``top_k`` out of range, a table of another vocabulary, or (on a CPU) a drawn token outside it.
    """
    vocabulary = logits.shape[-1]
    if not 1 <= top_k <= vocabulary:
        raise ValueError(f"top_k must be between 1 and the {vocabulary} tokens, got {top_k}")
    if len(embeddings) < vocabulary:
        raise ValueError(f"need an embedding for each of {vocabulary} tokens, got {len(embeddings)}")
    embeddings = embeddings.detach().float()
    table = _Table(embeddings, None if normalised else _inverse_norms(embeddings))
    rows = logits.detach().reshape(-1, vocabulary)
    drawn = None if sampled is None else sampled.reshape(-1)
    moments = torch.empty(4, len(rows), device=logits.device)
    step = max(1, (CHUNK if logits.is_cuda else CPU_CHUNK) // vocabulary)
    score = _score_rows if logits.is_cuda else _score_rows_on_cpu
    for start in range(0, len(rows), step):
        part = slice(start, start + step)
        here = None if drawn is None else drawn[part]
        score(rows[part].float(), table, top_k, entropy_support == "full", here, moments[:, part])
    entropy, total, squares, square = moments.view(4, *logits.shape[:-1])
    if variant == "offdiag":
        divergence = squares - square
    elif variant == "rao":
        divergence = (total.square() - square).clamp(min=0)  # negative by rounding only
    else:
        divergence = -square
    return BranchingScores(entropy, divergence, entropy * divergence)


def semantic_entropy(
    logits: Tensor,
    embeddings: Tensor,
    top_k: int = 20,
    variant: Variant = "offdiag",
    entropy_support: EntropySupport = "full",
    sampled: Tensor | None = None,
    normalised: bool = False,
) -> Tensor:
    """Entropy times divergence, float32 ``(...)``: ROSE branches where it is largest. See :func:`branching_scores`."""
    return branching_scores(logits, embeddings, top_k, variant, entropy_support, sampled, normalised).semantic_entropy


def semantic_divergence(
    logits: Tensor, embeddings: Tensor, top_k: int = 20, variant: Variant = "offdiag", normalised: bool = False
) -> Tensor:
    """How unlike the most probable tokens are, float32 ``(...)``. See :func:`branching_scores`."""
    return branching_scores(logits, embeddings, top_k, variant, "topk", normalised=normalised).divergence


def largest(values: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The largest values of each row and their columns, ``(N, top_k)`` each, in no order.

    The columns are cut into blocks first: the largest values lie in the blocks with the largest maxima, which are found
    in the same way, so few columns are left to be sorted.

    Args:
        values: ``(N, V)``.
        top_k: At most V.
    """
    vocabulary = values.shape[1]
    blocks = vocabulary // BLOCK
    if blocks <= 2 * top_k:
        return values.topk(top_k, dim=-1, sorted=False)
    whole = blocks * BLOCK
    heads = values[:, :whole].unflatten(1, (BLOCK, blocks)).amax(1)  # a block is every ``blocks``-th column
    chosen = largest(heads, top_k)[1]
    starts = torch.arange(0, whole, blocks, device=values.device)
    candidates = (chosen[:, None] + starts[:, None]).flatten(1)
    if whole < vocabulary:
        rest = torch.arange(whole, vocabulary, device=values.device)
        candidates = torch.cat([candidates, rest.expand(len(values), -1)], dim=1)
    found, places = values.gather(1, candidates).topk(top_k, dim=-1, sorted=False)
    return found, candidates.gather(1, places)


def mean_cosine(embeddings: Tensor) -> Tensor:
    """Mean cosine over the pairs of different rows, from their sum: float32 ``(...)`` from ``(..., N, D)``.

    Of a token table it says how far the divergence can be trusted; of the embeddings of a prompt's responses it is
    the diversity that the paper shows (Figure 4). Rows of zeros have a cosine of 0.

    Raises:
        ValueError: Fewer than two rows.
    """
    count = embeddings.shape[-2]
    if count < 2:
        raise ValueError(f"need two rows to compare, got {count}")
    embeddings = embeddings.detach().float()
    scales = _inverse_norms(embeddings)
    total = (scales[..., None, :] @ embeddings)[..., 0, :]
    return (total.square().sum(-1) - (scales > 0).sum(-1)) / (count * (count - 1))


def clustered_semantic_entropy(embeddings: Tensor, threshold: float = 0.9) -> Tensor:
    """Entropy in nats of the clusters of a prompt's responses, shape ``()``; a diagnostic, not a part of ROSE.

    A response joins the first cluster to whose first member it has a cosine of at least the threshold, else it opens
    one.

    Args:
        embeddings: Of the responses, ``(N, D)``.
        threshold: Cosine.
    """
    unit = torch.nn.functional.normalize(embeddings.detach().float(), dim=-1)
    near, rows = unit @ unit.T >= threshold, torch.arange(len(unit), device=unit.device)
    cluster = torch.full_like(rows, -1)
    for row in range(len(unit)):
        cluster = torch.where((cluster < 0) & (cluster[row] < 0) & (near[row] | (rows == row)), row, cluster)
    shares = cluster.bincount().float() / max(len(unit), 1)
    return torch.special.entr(shares).sum()


def _score_rows(logits: Tensor, table: _Table, top_k: int, full: bool, drawn: Tensor | None, found: Tensor) -> None:
    """Entropy and moments of each row; see :func:`lit_rl.kernels.branching.score_rows`."""
    shifted = (logits - logits.amax(-1, keepdim=True)).clamp_(min=LOWEST)
    best_shifted, best = largest(shifted, top_k)
    powers = shifted.exp()
    total = powers.sum(-1)
    p = best_shifted.exp() / total[:, None]
    if full:
        found[0] = total.log() - torch.linalg.vecdot(powers, shifted) / total
    else:
        found[0] = -(p * (best_shifted - total.log()[:, None])).sum(-1)
        if drawn is not None:
            own = shifted.gather(1, drawn[:, None])[:, 0] - total.log()
            outside = (best != drawn[:, None]).all(1)
            found[0] -= torch.where(outside, own.exp() * own, 0.0)
    found[1], found[2] = p.sum(-1), p.square().sum(-1)
    weights = p if table.scales is None else p * table.scales[best]
    found[3] = embedding_bag(best, table.embeddings, mode="sum", per_sample_weights=weights).square().sum(-1)


def _score_rows_on_cpu(
    logits: Tensor, table: _Table, top_k: int, full: bool, drawn: Tensor | None, found: Tensor
) -> None:
    from lit_rl.kernels.branching import score_rows  # compiles at its first call, which is then kept on disk

    if drawn is not None and drawn.numel() and not 0 <= drawn.min() <= drawn.max() < logits.shape[1]:
        raise ValueError(f"drawn tokens must be below {logits.shape[1]}, got {drawn.min()} to {drawn.max()}")
    none = torch.empty(0)
    own, moments = none.long() if drawn is None else drawn.long(), torch.empty(found.shape)
    scales = none if table.scales is None else table.scales
    arrays = [each.contiguous().numpy() for each in (logits, table.embeddings, scales)]
    score_rows(*arrays, top_k, full, own.contiguous().numpy(), moments.numpy())
    found.copy_(moments)


def _inverse_norms(embeddings: Tensor) -> Tensor:
    """What brings each row to length 1, ``(..., N)``; 0 for rows of zeros."""
    norms = embeddings.norm(dim=-1)
    return torch.where(norms > 0, 1 / norms, 0.0)
