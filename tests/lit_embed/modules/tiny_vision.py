"""Vision-language models of a few thousand weights, with random weights that are always the same."""

from typing import Any

import torch

TEXT = {
    "vocab_size": 100,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]},
    "bos_token_id": 96,
    "eos_token_id": 97,
}
VISION: dict[str, dict[str, Any]] = {
    "qwen2_vl": {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "mlp_ratio": 2},
    "qwen2_5_vl": {"depth": 1, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2, "intermediate_size": 48},
}
IDS = {"image_token_id": 92, "video_token_id": 93, "vision_start_token_id": 94, "vision_end_token_id": 95}


def vision_model(name: str, attention: str = "sdpa", **vision: Any) -> Any:
    """A Qwen2-VL or Qwen2.5-VL with four query heads on two key heads."""
    import transformers

    kind = {"qwen2_vl": "Qwen2VL", "qwen2_5_vl": "Qwen2_5_VL"}[name]
    config = getattr(transformers, f"{kind}Config")(text_config=TEXT, vision_config=VISION[name] | vision, **IDS)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model_class = getattr(transformers, f"{kind}ForConditionalGeneration")
        return model_class._from_config(config, attn_implementation=attention)
