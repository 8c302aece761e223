from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil, smart_resize

from lit_core.backbones import Lora, load_backbone
from lit_core.errors import InputError
from lit_core.files import write_json
from lit_core.images import ImageSettings, load_image_settings, patches, resized
from lit_core.presets import preset_tokenizer


def _noise(height: int, width: int, mode: str = "RGB") -> Image.Image:
    values = np.random.default_rng(height * 1000 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


@pytest.mark.parametrize(("side", "tokens"), [(336, 144), (448, 256), (672, 576), (56, 4), (112, 16)])
def test_tokens_of_a_square_image(side: int, tokens: int) -> None:
    found = patches(_noise(50, 80), ImageSettings(), side)
    assert found.grid == (1, side // 14, side // 14)
    assert found.pixels.shape == (4 * tokens, 1176)  # 2 frames, 3 colours, 14 x 14 pixels


def test_where_a_pixel_goes() -> None:
    """A white pixel in row 17, column 40: second patch row, third patch column, of the second token."""
    values = np.zeros((56, 56, 3), dtype=np.uint8)
    values[17, 40, 1] = 255
    settings = ImageSettings(mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    found = patches(Image.fromarray(values), settings).pixels
    green = 2 * 196  # both frames of red come first
    place = (17 - 14) * 14 + 40 - 28
    assert found.nonzero().tolist() == [[4 + 2, green + place], [4 + 2, green + 196 + place]]
    assert float(found.sum()) == 2


def test_patches_are_those_of_the_models_own_processor() -> None:
    random = np.random.default_rng(0)
    for number in range(12):
        height, width = random.integers(10, 300, 2).tolist()
        bounds = (56 * 56, int(random.integers(8, 60)) * 28 * 28)
        theirs = Qwen2VLImageProcessorPil(size={"shortest_edge": bounds[0], "longest_edge": bounds[1]})
        image = _noise(height, width, ["RGB", "L", "RGBA"][number % 3])
        expected = theirs(images=[image.convert("RGB")], return_tensors="pt")
        found = patches(image, ImageSettings(min_pixels=bounds[0], max_pixels=bounds[1]))
        assert [list(found.grid)] == expected["image_grid_thw"].tolist()
        torch.testing.assert_close(found.pixels, expected["pixel_values"], atol=2e-6, rtol=0)


def test_a_square_image_is_what_the_processor_makes_of_the_stretched_one() -> None:
    image = _noise(90, 40)
    expected = Qwen2VLImageProcessorPil()(images=[image.resize((112, 112), 3)], return_tensors="pt")
    torch.testing.assert_close(patches(image, ImageSettings(), 112).pixels, expected["pixel_values"], atol=2e-6, rtol=0)


def test_sizes_are_those_of_the_formula() -> None:
    random = np.random.default_rng(1)
    settings = ImageSettings(min_pixels=4 * 784, max_pixels=64 * 784)
    for height, width in random.integers(1, 2000, (300, 2)).tolist():
        if max(height, width) <= 200 * min(height, width):
            size = resized(height, width, settings)
            assert size == smart_resize(height, width, 28, 4 * 784, 64 * 784)
            assert size[0] * size[1] / 784 >= 4  # below the upper bound too, unless a side is one token already
    assert resized(100, 100, settings) == (112, 112)
    assert resized(427, 640, settings) == (168, 252)
    assert resized(14, 14, settings) == (56, 56)
    assert resized(42, 70, ImageSettings()) == (56, 56)  # halves go to the even number of tokens


def test_an_elongated_image_is_refused() -> None:
    with pytest.raises(InputError, match="sides of 603 x 3 pixels: one is more than 200 times the other"):
        resized(3, 603, ImageSettings())
    assert patches(_noise(3, 603), ImageSettings(), 56).grid == (1, 4, 4)  # a square needs no proportions


@pytest.mark.parametrize(
    "fields",
    [
        {"min_pixels": 3136, "max_pixels": 50176},
        {"size": {"shortest_edge": 3136, "longest_edge": 50176}},
        {"size": {"min_pixels": 3136, "max_pixels": 50176}},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 3136, "max_pixels": 50176},
    ],
)
def test_settings_of_any_age_are_read(fields: dict[str, Any]) -> None:
    found = ImageSettings.from_dict({"image_processor_type": "Qwen2VLImageProcessorFast", "patch_size": 16, **fields})
    assert found == ImageSettings(patch=16, min_pixels=3136, max_pixels=50176)
    assert ImageSettings.from_dict(found.to_dict()) == found


def test_the_models_own_processor_reads_what_is_written(tmp_path: Path) -> None:
    settings = ImageSettings(mean=(0.4, 0.5, 0.6), std=(0.2, 0.3, 0.4), max_pixels=30 * 784)
    write_json(tmp_path / "preprocessor_config.json", settings.to_dict())
    theirs = Qwen2VLImageProcessorPil.from_pretrained(tmp_path)
    image = _noise(200, 170)
    expected = theirs(images=[image], return_tensors="pt")["pixel_values"]
    torch.testing.assert_close(patches(image, settings).pixels, expected, atol=2e-6, rtol=0)


def test_settings_come_with_the_backbone(tmp_path: Path) -> None:
    Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 9408}).save_pretrained(tmp_path / "old")
    assert load_image_settings(str(tmp_path / "old")).max_pixels == 9408
    newer = {"processor_class": "Qwen2VLProcessor", "image_processor": ImageSettings(max_pixels=7840).to_dict()}
    write_json(tmp_path / "old" / "processor_config.json", newer)
    assert load_image_settings(str(tmp_path / "old")).max_pixels == 7840
    assert load_image_settings("tiny-qwen2-vl") == ImageSettings(max_pixels=64 * 784)


def test_an_adapter_reads_images_as_its_base_does(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    load_backbone("tiny-qwen2-vl").save_pretrained(base)  # type: ignore[operator]
    preset_tokenizer("tiny-qwen2-vl").save_pretrained(base)
    write_json(base / "preprocessor_config.json", ImageSettings(max_pixels=7840).to_dict())
    load_backbone(str(base), lora=Lora(r=2)).save_pretrained(adapter)  # type: ignore[operator]
    assert load_image_settings(str(adapter)).max_pixels == 7840


def test_what_cannot_be_prepared_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="preset 'tiny-qwen3' reads no images"):
        load_image_settings("tiny-qwen3")
    with pytest.raises(InputError, match=r"backbone '.*' does not say how it reads images"):
        load_image_settings(str(tmp_path))
    with pytest.raises(InputError, match="images are prepared by CLIPImageProcessor, not as Qwen2-VL does"):
        ImageSettings.from_dict({"image_processor_type": "CLIPImageProcessor"})
    with pytest.raises(InputError, match="prepared by Qwen2VLImageProcessor without do_normalize"):
        ImageSettings.from_dict({"do_normalize": False})
    with pytest.raises(InputError, match="min_pixels must be at most max_pixels, and that at least 784, got 3136 and"):
        ImageSettings().bounded(None, 1000)
    with pytest.raises(InputError, match="min_pixels must be at most max_pixels"):
        ImageSettings().bounded(100, 700)
