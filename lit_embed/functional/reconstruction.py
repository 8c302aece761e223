"""What CoCoA's first two stages hide, and how they score what comes back (card sections 2.1, 2.2 and 8).

Text: masked next-token prediction (MNTP). A token that was replaced by the mask token is predicted from the state of
the token before it. Images: merged tokens (2 x 2 patches) are overwritten by noise before the vision tower, and their
pixels regressed. Every draw comes from the seed of its own row or image and falls on candidates alone, one each, in
their order; so what a row loses does not hang on the rows beside it, nor on the padding.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from lit_core.errors import InputError
from lit_core.lm_head import IGNORE_INDEX, cross_entropy


class MaskedTokens(NamedTuple):
    """A batch with hidden tokens.

    Args:
        input_ids: Long ``(B, L)``, hidden tokens replaced by the mask token.
        labels: Long ``(B, L)``, the hidden token where one is hidden, -100 elsewhere; not shifted.
    """

    input_ids: Tensor
    labels: Tensor


class HiddenPatches(NamedTuple):
    """Images with hidden merged tokens.

    Args:
        pixel_values: ``(P, D)``, the rows of hidden patches overwritten by noise.
        hidden: Bool ``(P / merge_size**2,)``, True = this merged token is hidden.
        targets: ``(n, merge_size**2 * D)``, what stood in the ``n`` hidden ones, patch after patch.
    """

    pixel_values: Tensor
    hidden: Tensor
    targets: Tensor


def draw_hidden(candidates: Tensor, rate: float, generator: Generator) -> Tensor:
    """Hide each candidate with probability ``rate``, and at least one where there is any.

    Args:
        candidates: Bool ``(N,)``, True = may be hidden; on the CPU, like the generator.
        rate: Probability, above 0 and at most 1.
        generator: Gives one uniform draw a candidate; that with the smallest is hidden in any case.

    Returns:
        Bool ``(N,)``, True = hidden.

    Raises:
        InputError: ``rate`` is out of range.
    """
    if not 0 < rate <= 1:
        raise InputError(f"the share to hide must be above 0 and at most 1, got {rate}")
    draws = torch.rand(int(candidates.sum()), generator=generator)
    hidden = draws < rate
    if len(draws):
        hidden[draws.argmin()] = True
    return torch.zeros_like(candidates).masked_scatter(candidates, hidden)


def maskable_tokens(
    input_ids: Tensor, valid: Tensor, never: Sequence[int] | Tensor, behind: Tensor | None = None
) -> Tensor:
    """Tokens that may be hidden: ordinary text with a token before it, from whose state it can be predicted.

    Args:
        input_ids: Long ``(B, L)``.
        valid: Bool ``(B, L)``, True = token, False = padding.
        never: Ids that are never hidden: special tokens, image and video tokens.
        behind: Long ``(B,)``; only tokens behind this position (stage 2: the bridge). None takes the whole row.

    Returns:
        Bool ``(B, L)``.
    """
    excluded = torch.as_tensor(never, dtype=input_ids.dtype, device=input_ids.device)
    found = valid & ~torch.isin(input_ids, excluded) & (predecessors(valid) >= 0)
    if behind is not None:
        found &= torch.arange(valid.shape[1], device=valid.device) > behind[:, None]
    return found


def draw_masked(maskable: Tensor, rate: float, seeds: Sequence[int]) -> Tensor:
    """Draw the tokens to hide, at least one in each row that has any.

    Args:
        maskable: Bool ``(B, L)`` on the CPU, from :func:`maskable_tokens`.
        rate: Probability of hiding a token.
        seeds: One for each row.

    Returns:
        Bool ``(B, L)``, True = hidden.

    Raises:
        InputError: ``rate`` is out of range.
        ValueError: There are not as many seeds as rows.
    """
    if len(seeds) != len(maskable):
        raise ValueError(f"need one seed a row, got {len(seeds)} for {len(maskable)} rows")
    generators = (Generator().manual_seed(seed) for seed in seeds)
    rows = [draw_hidden(row, rate, generator) for row, generator in zip(maskable.unbind(), generators, strict=True)]
    return torch.stack(rows) if rows else torch.zeros_like(maskable)


def mask_tokens(input_ids: Tensor, masked: Tensor, mask_id: int) -> MaskedTokens:
    """Replace hidden tokens ``(B, L)`` by the mask token, and keep them as labels."""
    return MaskedTokens(input_ids.masked_fill(masked, mask_id), input_ids.masked_fill(~masked, IGNORE_INDEX))


def predecessors(valid: Tensor) -> Tensor:
    """Column of the token before each position, wherever padding lies: Long ``(B, L)``, -1 where there is none."""
    position = torch.arange(valid.shape[1], device=valid.device)
    latest = torch.where(valid, position, -1).cummax(1).values
    return F.pad(latest[:, :-1], (1, 0), value=-1)


def label_states(states: Tensor, labels: Tensor, valid: Tensor, shift: bool = True) -> tuple[Tensor, Tensor]:
    """States that predict hidden tokens, and these tokens, row by row.

    Args:
        states: ``(B, L, D)``.
        labels: Long ``(B, L)``, not shifted; -100 is ignored. So is a label without a token before it.
        valid: Bool ``(B, L)``, True = token, False = padding.
        shift: Predict a token from the state before it (MNTP); False takes its own state, as MoCa does.

    Returns:
        ``(n, D)`` and Long ``(n,)``.
    """
    source = predecessors(valid) if shift else torch.arange(valid.shape[1], device=valid.device).expand_as(labels)
    rows, columns = ((labels != IGNORE_INDEX) & (source >= 0)).nonzero(as_tuple=True)
    return states[rows, source[rows, columns]], labels[rows, columns]


def mntp_loss(
    states: Tensor, labels: Tensor, valid: Tensor, weight: Tensor, bias: Tensor | None = None, shift: bool = True
) -> Tensor:
    """Masked next-token prediction: ``-mean log p(x_i | h_{i-1})`` over the hidden tokens (CoCoA, L_mntp and L2).

    Args:
        states: Final states ``(B, L, D)`` of the batch with hidden tokens.
        labels: Long ``(B, L)`` from :func:`mask_tokens`.
        valid: Bool ``(B, L)``, True = token, False = padding.
        weight: Head weight ``(V, D)``; only states that predict a hidden token meet it.
        bias: Head bias ``(V,)``.
        shift: False predicts each hidden token from its own state (MoCa).

    Returns:
        Loss in nats a token, shape ``()``, float32.

    Raises:
        ValueError: Nothing is hidden, so that there is no mean.
    """
    predicting, targets = label_states(states, labels, valid, shift)
    return cross_entropy(predicting, weight, targets, bias)


def hide_patches(
    pixel_values: Tensor,
    grid_thw: Tensor,
    ratio: float,
    seeds: Sequence[int],
    merge_size: int = 2,
    shared_noise: bool = False,
) -> HiddenPatches:
    """Overwrite a share of the merged tokens of each image by Gaussian noise, at least one an image.

    Args:
        pixel_values: Patches of all images ``(P, D)`` as the processor of Qwen2-VL gives them: normalised, the
            ``merge_size**2`` patches of a merged token one after the other. On the CPU.
        grid_thw: Long ``(images, 3)``, frames, rows and columns of patches.
        ratio: Probability of hiding a merged token.
        seeds: One for each image.
        merge_size: Rows, and columns, of patches in a merged token.
        shared_noise: One row of noise for all hidden patches of an image (MoCa: of a batch) instead of one each.

    Returns:
        A copy with noise, the hidden merged tokens, and what stood there.

    Raises:
        InputError: ``ratio`` is out of range.
        ValueError: Seeds or patches do not fit the grids.
    """
    unit = merge_size**2
    tokens = [patches // unit for patches in grid_thw.prod(1).tolist()]
    if len(seeds) != len(tokens):
        raise ValueError(f"need one seed an image, got {len(seeds)} for {len(tokens)} images")
    if sum(tokens) * unit != len(pixel_values):
        raise ValueError(f"grids of {sum(tokens) * unit} patches do not fit {len(pixel_values)} rows of pixels")
    hidden, noise = [torch.zeros(0, dtype=torch.bool)], [pixel_values[:0]]
    for count, seed in zip(tokens, seeds, strict=True):
        generator = Generator().manual_seed(seed)
        hidden.append(draw_hidden(torch.ones(count, dtype=torch.bool), ratio, generator))
        wanted = int(hidden[-1].sum()) * unit
        drawn = torch.randn(1 if shared_noise else wanted, pixel_values.shape[1], generator=generator)
        noise.append(drawn.to(pixel_values.dtype).expand(wanted, -1))
    chosen = torch.cat(hidden)
    noisy = pixel_values.clone()
    noisy[chosen.repeat_interleave(unit)] = torch.cat(noise)
    return HiddenPatches(noisy, chosen, pixel_targets(pixel_values, chosen, merge_size))


def pixel_targets(pixel_values: Tensor, hidden: Tensor, merge_size: int = 2) -> Tensor:
    """Pixels of hidden merged tokens ``(n, merge_size**2 * D)``, patch after patch, from all patches ``(P, D)``."""
    return pixel_values.view(len(hidden), merge_size**2 * pixel_values.shape[1])[hidden]


def place_hidden(image_tokens: Tensor, hidden: Tensor) -> Tensor:
    """Where the hidden merged tokens stand in the rows.

    Args:
        image_tokens: Bool ``(B, L)``, True = image token; images in the order of the rows.
        hidden: Bool ``(M,)`` from :func:`hide_patches`.

    Returns:
        Bool ``(B, L)``.

    Raises:
        ValueError: There are not as many image tokens as merged tokens.
    """
    count = int(image_tokens.sum())
    if count != len(hidden):
        raise ValueError(f"{count} image tokens in the rows do not fit {len(hidden)} merged tokens of the images")
    return torch.zeros_like(image_tokens).masked_scatter(image_tokens, hidden)


def masked_patch_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Mean over hidden patches of the squared error divided by the number of pixels (CoCoA, L_mae).

    Args:
        predictions: ``(n, D)``; merged tokens as a whole or patches one by one give the same.
        targets: ``(n, D)``, normalised pixels.

    Returns:
        Shape ``()``, float32; 0 where nothing is hidden.

    Raises:
        ValueError: The shapes differ.
    """
    if predictions.shape != targets.shape:
        raise ValueError(f"predictions {tuple(predictions.shape)} and targets {tuple(targets.shape)} differ in shape")
    return (predictions.float() - targets.float()).square().sum() / max(1, targets.numel())


def joint_loss(text: Tensor, image: Tensor, weight: float = 0.5) -> Tensor:
    """Loss of stage 1, ``L_mntp + weight * L_mae``; MoCa's weight is 0.1.

    Raises:
        InputError: The weight is below 0.
    """
    if not weight >= 0:
        raise InputError(f"the weight of the image loss must be at least 0, got {weight}")
    return text + weight * image
