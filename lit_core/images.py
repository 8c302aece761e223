"""Images as the patches that Qwen2-VL and Qwen2.5-VL read; needs Pillow and torch, not torchvision."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_core.backbones import adapter_base
from lit_core.errors import InputError
from lit_core.presets import is_preset, preset_images

if TYPE_CHECKING:
    from PIL.Image import Image

Grid = tuple[int, int, int]  # frames, rows, columns, in patches
MOST_ELONGATED = 200  # longer side over shorter side, as the models' own processor has it
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class ImageSettings:
    """What ``preprocessor_config.json`` says.

    Args:
        mean: Of each colour, on the scale from 0 to 1.
        std: Of each colour.
        patch: Side of a patch in pixels.
        merge: Patches on each side of what becomes one vision token.
        frames: Times that a still image is repeated.
        min_pixels: An image is scaled up to this area.
        max_pixels: An image is scaled down to this area.
        resample: Pillow's number of the interpolation; 3 is bicubic.
        rescale: Takes a byte to the scale from 0 to 1.
    """

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    patch: int = 14
    merge: int = 2
    frames: int = 2
    min_pixels: int = 56 * 56
    max_pixels: int = 28 * 28 * 1280
    resample: int = 3
    rescale: float = 1 / 255

    @property
    def factor(self) -> int:
        """Sides of a prepared image are multiples of this many pixels, those of one vision token."""
        return self.patch * self.merge

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> "ImageSettings":
        """Read the fields of a Qwen2-VL image processor, of any age.

        Raises:
            InputError: It is another kind of processor.
        """
        kind = values.get("image_processor_type", "Qwen2VLImageProcessor")
        off = [name for name in ("do_resize", "do_rescale", "do_normalize") if values.get(name) is False]
        if not kind.startswith("Qwen2VLImageProcessor") or off:
            raise InputError(
                f"images are prepared by {kind}{' without ' + off[0] if off else ''}, not as Qwen2-VL does"
            )
        names = {"patch": "patch_size", "merge": "merge_size", "frames": "temporal_patch_size"}
        names |= {"resample": "resample", "rescale": "rescale_factor"}
        found = {field: values[name] for field, name in names.items() if values.get(name) is not None}
        found |= {name: tuple(values[f"image_{name}"]) for name in ("mean", "std") if values.get(f"image_{name}")}
        size = values.get("size") or {}
        for name, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
            given = [pixels for pixels in (values.get(name), size.get(edge), size.get(name)) if pixels]
            found |= {name: given[0]} if given else {}
        return cls(**found)

    def to_dict(self) -> dict[str, Any]:
        """Fields of ``preprocessor_config.json``, for old and new versions of transformers."""
        return {
            "image_processor_type": "Qwen2VLImageProcessor",
            "do_convert_rgb": True,
            "do_resize": True,
            "do_rescale": True,
            "do_normalize": True,
            "image_mean": list(self.mean),
            "image_std": list(self.std),
            "patch_size": self.patch,
            "merge_size": self.merge,
            "temporal_patch_size": self.frames,
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "size": {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels},
            "resample": self.resample,
            "rescale_factor": self.rescale,
        }

    def bounded(self, min_pixels: int | None, max_pixels: int | None) -> "ImageSettings":
        """These settings with other bounds on the area; None keeps a bound.

        Raises:
            InputError: The lower bound exceeds the upper one, or no token fits below that.
        """
        chosen = replace(self, min_pixels=min_pixels or self.min_pixels, max_pixels=max_pixels or self.max_pixels)
        if not chosen.min_pixels <= chosen.max_pixels or chosen.max_pixels < self.factor**2:
            raise InputError(
                f"min_pixels must be at most max_pixels, and that at least {self.factor**2}, got {chosen.min_pixels} "
                f"and {chosen.max_pixels}"
            )
        return chosen


@dataclass(frozen=True, eq=False)
class Patches:
    """A prepared image.

    Args:
        pixels: Float32 ``(rows * columns, 3 * frames * patch * patch)``; the ``merge * merge`` rows of one vision token
            stand together, in the order of the tokens.
        grid: Frames, rows and columns in patches.
    """

    pixels: Tensor
    grid: Grid


def load_image_settings(backbone: str, trust_remote_code: bool = False) -> ImageSettings:
    """How a backbone wants its images.

    Args:
        backbone: Preset, local folder (of an adapter too), or hub id.
        trust_remote_code: Handed on to transformers.

    Raises:
        InputError: The backbone reads no images, or prepares them in another way.
    """
    if is_preset(backbone):
        found = preset_images(backbone)
        if not found:
            raise InputError(f"preset '{backbone}' reads no images")
        return ImageSettings.from_dict(found)
    from transformers.image_processing_base import ImageProcessingMixin

    own = any((Path(backbone) / name).is_file() for name in ("preprocessor_config.json", "processor_config.json"))
    source = backbone if own else adapter_base(backbone) or backbone
    try:
        values, _ = ImageProcessingMixin.get_image_processor_dict(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"backbone '{backbone}' does not say how it reads images: {reason}") from None
    return ImageSettings.from_dict(values)


def resized(height: int, width: int, settings: ImageSettings) -> tuple[int, int]:
    """Height and width of a prepared image: whole vision tokens, near its proportions, within the bounds on the area.

    Raises:
        InputError: The image is too elongated.
    """
    if max(height, width) > MOST_ELONGATED * min(height, width):
        raise InputError(f"sides of {width} x {height} pixels: one is more than {MOST_ELONGATED} times the other")
    factor = settings.factor
    sides = [round(side / factor) * factor for side in (height, width)]
    area = math.prod(sides)
    if area > settings.max_pixels:
        shrink = math.sqrt(height * width / settings.max_pixels)
        sides = [max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)]
    elif area < settings.min_pixels:
        grow = math.sqrt(settings.min_pixels / (height * width))
        sides = [math.ceil(side * grow / factor) * factor for side in (height, width)]
    return sides[0], sides[1]


def patches(image: "Image", settings: ImageSettings, side: int | None = None) -> Patches:
    """Prepare an image: resize, scale, normalise, cut into patches.

    Args:
        image: In any mode; it becomes RGB.
        settings: Of the backbone.
        side: Stretch the image to a square of this side in pixels, a multiple of ``settings.factor``; by default the
            image is resized near its proportions.

    Raises:
        InputError: The image is too elongated.
    """
    import numpy as np

    image = image if image.mode == "RGB" else image.convert("RGB")
    height, width = (side, side) if side else resized(image.height, image.width, settings)
    if (image.height, image.width) != (height, width):
        image = image.resize((width, height), settings.resample)
    size, merge = settings.patch, settings.merge
    rows, columns = height // size, width // size
    cut = torch.from_numpy(np.array(image)).view(rows // merge, merge, size, columns // merge, merge, size, 3)
    cut = cut.permute(0, 3, 1, 4, 6, 2, 5).float()  # token row, token column, patch row, patch column, colour, y, x
    std = torch.tensor(settings.std)
    scale, shift = settings.rescale / std, -torch.tensor(settings.mean) / std
    scaled = torch.addcmul(shift[:, None, None], cut, scale[:, None, None])
    frames = scaled[:, :, :, :, :, None].expand(*scaled.shape[:5], settings.frames, size, size)
    return Patches(frames.reshape(rows * columns, -1), (1, rows, columns))
