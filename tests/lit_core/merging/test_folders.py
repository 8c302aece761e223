import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.errors import InputError
from lit_core.merging import folders, merge, merge_folders
from lit_core.presets import preset_config, preset_tokenizer

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 8}  # fmt: skip


def written(
    folder: Path, seed: int, dtype: torch.dtype = torch.float32, tied: bool = True, shards: str = "5GB"
) -> Path:
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = preset_config("nano-qwen3", **SIZES, tie_word_embeddings=tied)
    model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder, max_shard_size=shards)
    preset_tokenizer("nano-qwen3").save_pretrained(folder)
    return folder


def loaded(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_merged_folder_loads_and_holds_what_merged_state_dicts_hold(
    tmp_path: Path, tied: bool, dtype: torch.dtype
) -> None:
    from transformers import AutoTokenizer

    parts = [written(tmp_path / f"m{seed}", seed, dtype, tied) for seed in range(3)]
    merge_folders(parts[1:], tmp_path / "out", "task_arithmetic", [0.4, 0.7], base=parts[0])
    states = [loaded(part).state_dict() for part in parts]
    expected = merge(states[1:], "task_arithmetic", [0.4, 0.7], states[0])
    model = loaded(tmp_path / "out")
    assert model.dtype == dtype
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    assert (model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()) == tied
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token == "<|im_end|>"
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_folders_in_parts_are_read_and_written(tmp_path: Path) -> None:
    whole, parts = written(tmp_path / "whole", 1), written(tmp_path / "parts", 2, shards="20KB")
    assert (parts / folders.INDEX).is_file()
    merge_folders([whole, parts], tmp_path / "one", "linear", [1, 3])
    merge_folders([parts, whole], tmp_path / "several", "linear", [3, 1], shard_bytes=10_000)
    index = json.loads((tmp_path / "several" / folders.INDEX).read_text())
    assert len(set(index["weight_map"].values())) > 2
    one, several = loaded(tmp_path / "one"), loaded(tmp_path / "several")
    states = [loaded(folder).state_dict() for folder in (whole, parts)]
    torch.testing.assert_close(dict(one.state_dict()), merge(states, "linear", [1, 3]), rtol=0, atol=0)
    torch.testing.assert_close(several.state_dict(), one.state_dict())
    assert index["metadata"]["total_size"] == sum(p.numel() * 4 for p in several.parameters())


def test_mistakes_leave_nothing_behind(tmp_path: Path) -> None:
    one, other = written(tmp_path / "one", 1), written(tmp_path / "other", 2, tied=False)
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"other has a tensor 'lm_head.weight' that the others lack"):
        merge_folders([one, other], out, "linear")
    with pytest.raises(InputError, match=r"has no config\.json"):
        merge_folders([one, tmp_path], out, "linear")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    with pytest.raises(InputError, match="is an adapter; export it with --form merged"):
        merge_folders([one, tmp_path / "adapter"], out, "linear")
    config = json.loads((one / "config.json").read_text())
    third = written(tmp_path / "third", 3)
    (third / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(InputError, match=r"third/config.json: field 'model_type': is llama, but qwen3 in"):
        merge_folders([one, third], out, "linear")
    (third / "config.json").write_text(json.dumps(config))
    (third / folders.WEIGHTS).write_bytes(b"nonsense")
    with pytest.raises(InputError, match=r"third/model\.safetensors: cannot be read"):
        merge_folders([one, third], out, "linear")
    (third / folders.WEIGHTS).unlink()
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        merge_folders([one, third], out, "linear")
    with pytest.raises(InputError, match="exists and is not empty"):
        merge_folders([one], other, "linear")
    assert not out.exists()
    assert not list(tmp_path.glob(".*"))
