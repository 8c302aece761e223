"""An exported folder loads in transformers and peft, and gives our vectors here again."""

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from transformers import AutoImageProcessor, AutoModel, AutoModelForImageTextToText, AutoTokenizer

from lit_core.backbones import BackboneConfig, Lora, load_backbone
from lit_core.errors import InputError
from lit_core.files import read_json, write_json
from lit_core.presets import preset_tokenizer
from lit_embed.items import MARKER, ImageFile, ImageSource, Item
from lit_embed.modules.multimodal import SETTINGS, MultimodalEncoder, build_multimodal_encoder
from lit_embed.modules.multimodal_export import export_multimodal_encoder
from lit_embed.modules.multimodal_tokenization import MultimodalConfig

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing:FutureWarning"
)  # peft on newer transformers

Make = Callable[..., ImageSource]
LORA, DORA = Lora(r=2, dropout=0.3), Lora(r=2, dora=True)


class Case(NamedTuple):
    backbone: str
    config: MultimodalConfig
    form: str = "merged"
    lora: Lora | None = None


CASES = {
    "whole": Case("tiny-qwen2-vl", MultimodalConfig(query_prompt="find: ", max_tokens=30)),
    "whole-2.5": Case("tiny-qwen2_5-vl", MultimodalConfig(attention="causal", image_size=84, bridge="<|im_start|>")),
    "dimensions": Case("tiny-qwen2_5-vl", MultimodalConfig(dimensions=16, normalize=False, max_pixels=9 * 784)),
    "lora-merged": Case("tiny-qwen2-vl", MultimodalConfig(image_size=56), "merged", LORA),
    "dora-merged": Case("tiny-qwen2_5-vl", MultimodalConfig(image_size=56), "merged", DORA),
    "lora-adapter": Case("tiny-qwen2_5-vl", MultimodalConfig(image_size=56, passage_prompt="read: "), "adapter", LORA),
    "dora-adapter": Case("tiny-qwen2-vl", MultimodalConfig(), "adapter", DORA),
}


def _trained(backbone: str, config: MultimodalConfig, lora: Lora | None) -> MultimodalEncoder:
    encoder = build_multimodal_encoder(backbone, config, lora=lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():  # as if trained: fresh adapters are zero
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01, generator=generator)
    return encoder


@pytest.mark.parametrize("name", CASES)
def test_a_folder_gives_the_vectors_again(name: str, mixed_items: list[Item], tmp_path: Path) -> None:
    case = CASES[name]
    encoder = _trained(case.backbone, case.config, case.lora)
    folder = tmp_path / "out"
    export_multimodal_encoder(encoder, folder, case.form, "card", case.backbone)
    again = build_multimodal_encoder(str(folder))
    assert again.config == encoder.config
    for kind in ("query", "passage"):
        found, expected = (one.encode(mixed_items, kind, progress=False) for one in (again, encoder))  # type: ignore[arg-type]
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (folder / "adapter_config.json").is_file() == (case.form == "adapter")
    assert (folder / "README.md").read_text().endswith("card")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@torch.no_grad()
def _by_hand(encoder: MultimodalEncoder, folder: Path, item: Item) -> torch.Tensor:
    """What a user of plain transformers writes, for a causal encoder."""
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    images = AutoImageProcessor.from_pretrained(folder, backend="pil")
    assert item.image is not None
    shown = images(images=[item.image.load()], return_tensors="pt")
    placeholders = "<|image_pad|>" * (int(shown["image_grid_thw"].prod()) // 4)
    bridge = tokenizer.convert_ids_to_tokens(encoder.item_tokenizer.bridge_id)
    text = f"<|vision_start|>{placeholders}<|vision_end|>{encoder.config.query_prompt}{item.text}{bridge}"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    kinds = (ids == model.config.image_token_id).int()
    return nn.functional.normalize(model(input_ids=ids, mm_token_type_ids=kinds, **shown).last_hidden_state[:, -1])


@pytest.mark.parametrize("backbone", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_plain_transformers_gives_the_same_vector(backbone: str, tmp_path: Path, noise: Make) -> None:
    config = MultimodalConfig(attention="causal", query_prompt="find: ", max_pixels=20 * 784)
    encoder = _trained(backbone, config, LORA)
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", backbone)
    item = Item("the man", noise(200, 130))
    expected = encoder.encode([item], "query")
    torch.testing.assert_close(_by_hand(encoder, tmp_path / "out", item), expected, atol=1e-5, rtol=0)


@pytest.mark.skipif(find_spec("torchvision") is None, reason="transformers' own processor of videos needs torchvision")
@pytest.mark.parametrize("backbone", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_the_processor_loads(backbone: str, tmp_path: Path, noise: Make) -> None:
    from transformers import AutoProcessor

    encoder = build_multimodal_encoder(backbone, MultimodalConfig(max_pixels=20 * 784))
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", backbone)
    image = noise(200, 130)
    text = "<|vision_start|><|image_pad|><|vision_end|>the man<|im_end|>"
    found = AutoProcessor.from_pretrained(tmp_path / "out")(text=[text], images=[image.load()], return_tensors="pt")
    tokens = encoder.tokenize([Item("the man", image)], "query")
    assert found["input_ids"][0].tolist() == tokens.ids.tolist()
    torch.testing.assert_close(found["pixel_values"], tokens.pixels, atol=0.05, rtol=0)  # it interpolates otherwise


@pytest.mark.parametrize("backbone", ["tiny-qwen2-vl", "tiny-qwen2_5-vl"])
def test_folders_of_transformers_alone_are_backbones(backbone: str, mixed_items: list[Item], tmp_path: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    model: Any = load_backbone(backbone, "causal_lm")
    model.save_pretrained(tmp_path)
    preset_tokenizer(backbone).save_pretrained(tmp_path)
    Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 50176}).save_pretrained(tmp_path)
    expected = build_multimodal_encoder(backbone).encode(mixed_items, "query")
    found = build_multimodal_encoder(str(tmp_path)).encode(mixed_items, "query")
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_a_language_model_keeps_its_head(mixed_items: list[Item], tmp_path: Path) -> None:
    """What a reconstruction stage hands to the next."""
    model: Any = load_backbone("tiny-qwen2-vl", "causal_lm", lora=LORA).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.05)
    encoder = build_multimodal_encoder("tiny-qwen2-vl", model=model)
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", "tiny-qwen2-vl")
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "out").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(again(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-5, rtol=1e-5)
    built = build_multimodal_encoder(str(tmp_path / "out"), lora=LORA)  # merged, then a fresh adapter
    torch.testing.assert_close(
        built.encode(mixed_items, "query"), encoder.encode(mixed_items, "query"), atol=1e-5, rtol=0
    )


def test_what_the_user_says_wins_over_the_folder(tmp_path: Path) -> None:
    encoder = build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(image_size=84, max_tokens=50, normalize=False))
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", "tiny-qwen2-vl")
    config = MultimodalConfig(image_size=0, normalize=True, chunk_tokens=9, skip_unreadable=True)
    found = build_multimodal_encoder(str(tmp_path / "out"), config).config
    assert (found.image_size, found.max_tokens, found.normalize) == (0, 50, True)
    assert (found.chunk_tokens, found.skip_unreadable) == (9, True)
    settings = read_json(tmp_path / "out" / SETTINGS)
    assert not {"chunk_tokens", "skip_unreadable"} & settings["encoder"].keys()
    write_json(tmp_path / "out" / SETTINGS, {"encoder": {"pooling": "mean"}})
    with pytest.raises(InputError, match=r"lit_multimodal.json: field 'pooling': this version knows no such setting"):
        build_multimodal_encoder(str(tmp_path / "out"), model=encoder.model)


def test_the_card_tells_how_to_go_without_us(tmp_path: Path) -> None:
    encoder = build_multimodal_encoder("tiny-qwen2-vl", MultimodalConfig(image_size=84, dimensions=8))
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "\nTrained.\n", "tiny-qwen2-vl")
    card = (tmp_path / "out" / "README.md").read_text()
    for words in (
        "base_model: tiny-qwen2-vl",
        "cut to 8 values, scaled to length 1",
        "84 x 84 pixels",
        "text<|im_end|>",
    ):
        assert words in card


def test_no_half_folder_is_left(tmp_path: Path) -> None:
    encoder = build_multimodal_encoder("tiny-qwen2-vl")
    with pytest.raises(InputError, match="there is no adapter to export"):
        export_multimodal_encoder(encoder, tmp_path / "out", "adapter", "", "tiny-qwen2-vl")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="the output folder exists and is not empty"):
        export_multimodal_encoder(encoder, tmp_path / "full", "merged", "", "tiny-qwen2-vl")


def test_lower_precision_is_kept(mixed_items: list[Item], tmp_path: Path) -> None:
    encoder = build_multimodal_encoder("tiny-qwen2-vl", loading=BackboneConfig(dtype="bfloat16"))
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", "tiny-qwen2-vl")
    again = build_multimodal_encoder(str(tmp_path / "out"), loading=BackboneConfig(dtype="auto"))
    assert next(again.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(again.encode(mixed_items, "query"), encoder.encode(mixed_items, "query"), atol=0, rtol=0)


def test_photographs_through_an_exported_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("sklearn.datasets", reason="the photographs come with scikit-learn")
    folder = Path(datasets.__file__).parent / "images"
    encoder = build_multimodal_encoder("tiny-qwen2_5-vl", loading=BackboneConfig(init_std=0.05))
    export_multimodal_encoder(encoder, tmp_path / "out", "merged", "", "tiny-qwen2_5-vl")
    photographs = [ImageFile(folder / name) for name in ("china.jpg", "flower.jpg")]
    items = [
        *(Item("", photograph) for photograph in photographs),
        *(Item(f"{MARKER} what is shown?", photograph) for photograph in photographs),
        Item("a temple under a blue sky"),
    ]
    again = build_multimodal_encoder(str(tmp_path / "out"))
    tokens = again.tokenize(items, "passage")
    assert tokens.grids == [(1, 12, 18)] * 2  # 427 x 640 pixels come down to 168 x 252
    assert tokens.lengths[:2] == [6 * 9 + 3] * 2
    vectors = again.encode(items, "passage", progress=False)
    torch.testing.assert_close(vectors, encoder.encode(items, "passage", progress=False), atol=1e-5, rtol=0)
    similarity = vectors @ vectors.T
    assert float((similarity - torch.eye(5)).max()) < 0.999  # all five are told apart
    single = torch.cat([again.encode([item], "passage") for item in items])
    torch.testing.assert_close(single, vectors, atol=1e-5, rtol=0)
