"""Vision-language encoders as folders that transformers and peft load, and this suite again."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lit_core.backbones import text_model
from lit_core.export import new_folder, save_model
from lit_core.files import write_json, write_text
from lit_embed.modules.multimodal import SETTINGS, MultimodalEncoder

OF_THE_RUN = ("chunk_tokens", "skip_unreadable")  # settings that do not change a vector
PROCESSORS = {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}


def export_multimodal_encoder(
    encoder: MultimodalEncoder, output: Path, form: str, card: str, base: str, model: Any = None
) -> None:
    """Write model, tokenizer, image processor, the encoder's settings and a model card.

    ``AutoModel`` and ``AutoProcessor`` load the folder (the latter needs torchvision);
    :func:`lit_embed.modules.multimodal.build_multimodal_encoder` gives the same vectors from it.

    Args:
        encoder: Gives tokenizer, image settings, prompts, lengths.
        output: Folder to write; must not exist, or be empty.
        form: ``merged`` writes whole weights, ``adapter`` the peft adapter alone.
        card: Text of the model card, without its header.
        base: Name of the backbone that was trained.
        model: What to save instead of the encoder's own model: a larger one that contains it.

    Raises:
        InputError: As in :func:`lit_core.export.new_folder` and :func:`lit_core.export.save_model`.
    """
    with new_folder(output) as folder:
        save_model(encoder.model if model is None else model, folder, form, base, output)
        encoder.tokenizer.save_pretrained(folder)
        kind = text_model(encoder.model).config.model_type
        images = encoder.item_tokenizer.images.to_dict() | {"processor_class": PROCESSORS[kind]}
        write_json(folder / "preprocessor_config.json", images)
        settings = {name: value for name, value in asdict(encoder.config).items() if name not in OF_THE_RUN}
        write_json(folder / SETTINGS, {"encoder": settings})
        write_text(folder / "README.md", _header(base) + _usage(encoder) + card)


def _usage(encoder: MultimodalEncoder) -> str:
    """What someone needs who computes the vectors with transformers alone."""
    config, tokenizer = encoder.config, encoder.tokenizer
    bridge = tokenizer.convert_ids_to_tokens(encoder.item_tokenizer.bridge_id)
    side = config.image_size
    lines = [
        f"An item is written `<|vision_start|><|image_pad|>...<|vision_end|>text{bridge}`,",
        f"without an image `text{bridge}`;",
        f"its vector is the last layer's state at `{bridge}`"
        f"{f', cut to {config.dimensions} values' if config.dimensions else ''}"
        f"{', scaled to length 1' if config.normalize else ''}.",
        f"Attention is {config.attention}"
        f"{': pass an additive mask of four dimensions' if config.attention == 'bidirectional' else ''}.",
        f"Images are stretched to {side} x {side} pixels first." if side else "Images keep their proportions.",
        f"Prompts: query {config.query_prompt!r}, passage {config.passage_prompt!r}.",
    ]
    return "\n".join([*lines, "", ""])


def _header(base: str) -> str:
    lines = ["---", "library_name: transformers", f"base_model: {base}", "pipeline_tag: feature-extraction"]
    return "\n".join([*lines, "tags: [multimodal-embedding, feature-extraction]", "---", "", ""])
