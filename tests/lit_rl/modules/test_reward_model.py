from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.backbones import BackboneConfig, Lora
from lit_core.errors import InputError
from lit_rl.modules import reward_model as module
from lit_rl.modules.dialogues import dialogue_text
from lit_rl.modules.reward_model import RewardModel, ScoreLayer, build_reward_model

TEXTS = ["\n\nHuman: hi\n\nAssistant: hello there", "a", "one two three " * 9, "the end", "a much longer text " * 60]
MESSAGES = [{"role": "system", "content": "S"}, {"role": "user", "content": "U"}, {"role": "assistant", "content": "A"}]


def built(backbone: str, **settings: Any) -> RewardModel:
    """A reward model whose adapters do something."""
    model = build_reward_model(backbone, **settings).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.05
    return model


def saved(folder: Path, form: str = "merged", **settings: Any) -> tuple[RewardModel, Path]:
    model = built(settings.pop("backbone", "tiny-qwen3"), **settings)
    model.save(folder / form, form, "tiny-qwen3")
    return model, folder / form


@pytest.mark.parametrize("backbone", ["tiny-qwen3", "tiny-bert"])
def test_chunks_give_what_each_text_gives_alone(backbone: str) -> None:
    model = built(backbone)
    alone = torch.cat([model(model.tokenize([text])) for text in TEXTS])
    alone.sum().backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    together = model(model.tokenize(TEXTS))
    together.sum().backward()
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    assert expected.keys() == {name for name, p in model.named_parameters() if p.requires_grad}  # no weight is idle
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(model.scores(TEXTS * 2), alone.detach().repeat(2), atol=1e-5, rtol=0)


@pytest.mark.parametrize("backbone", ["tiny-qwen3", "tiny-llama", "tiny-bert"])
def test_an_over_long_text_keeps_its_end(backbone: str) -> None:
    model = built(backbone, max_length=16)
    one, other, cut = (f"{start} {'filling ' * 40}{end}" for start, end in (("b", "end"), ("c", "end"), ("b", "off")))
    tokens = model.tokenize([one, other, cut, "short"])
    assert tokens.lengths[:3] == [16] * 3
    assert tokens.lengths[3] < 16
    rewards = model(tokens)
    assert rewards[0] == rewards[1]
    assert rewards[0] != rewards[2]


def test_texts_without_tokens_and_no_texts() -> None:
    model = built("tiny-qwen3")
    assert model.scores(["", "a"])[1] == model.scores(["a"])[0]
    assert model.scores([]).shape == (0,)


@pytest.mark.parametrize("backbone", ["tiny-qwen3", "tiny-bert"])
@pytest.mark.parametrize("lora", [Lora(), Lora(r=4, dropout=0.0)], ids=["whole", "adapters"])
def test_a_merged_folder_is_that_of_plain_transformers(tmp_path: Path, backbone: str, lora: Lora) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, folder = saved(tmp_path, backbone=backbone, lora=lora, max_length=40)
    expected = model.scores(TEXTS)
    again = RewardModel.load(folder)
    assert again.tokenize.max_length == 40
    torch.testing.assert_close(again.scores(TEXTS), expected, atol=1e-5, rtol=0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    inputs = tokenizer(TEXTS, truncation=True, padding=True, return_tensors="pt")
    assert inputs["input_ids"].shape[1] == 40
    torch.testing.assert_close(plain(**inputs).logits[:, 0], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(model.scores(TEXTS), expected)  # saving has left the model in memory alone
    assert any("lora_" in name for name, _ in model.named_parameters()) == (lora.r > 0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
@pytest.mark.parametrize("backbone", ["tiny-qwen3", "tiny-bert"])
def test_an_adapter_folder_is_that_of_plain_peft(tmp_path: Path, backbone: str) -> None:
    from peft import AutoPeftModelForSequenceClassification

    model, folder = saved(tmp_path, "adapter", backbone=backbone, lora=Lora(r=4, dropout=0.0))
    expected = model.scores(TEXTS[:4])
    torch.testing.assert_close(RewardModel.load(folder).scores(TEXTS[:4]), expected, atol=1e-5, rtol=0)
    plain: Any = AutoPeftModelForSequenceClassification.from_pretrained(folder, num_labels=1).eval()
    inputs = model.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    torch.testing.assert_close(plain(**inputs).logits[:, 0], expected, atol=1e-5, rtol=0)
    assert all(parameter.requires_grad for parameter in RewardModel.load(folder).parameters())
    with pytest.raises(InputError, match="export it as merged"):
        build_reward_model(str(folder), lora=Lora(r=2))


def test_a_reward_model_keeps_its_head_and_another_backbone_gets_one(tmp_path: Path) -> None:
    model, folder = saved(tmp_path, loading=BackboneConfig(seed=3))
    head = model.model.score.weight
    other = BackboneConfig(seed=4)
    assert torch.equal(build_reward_model(str(folder), loading=other).model.score.weight, head)
    assert not torch.equal(build_reward_model("tiny-qwen3", loading=other).model.score.weight, head)
    assert 0.015 < head.std() < 0.025  # the architecture's own initialisation
    model.model.model.save_pretrained(tmp_path / "encoder")
    model.tokenizer.save_pretrained(tmp_path / "encoder")
    assert build_reward_model(str(tmp_path / "encoder")).model.score.weight.shape == head.shape
    with pytest.raises(InputError, match="no reward model"):
        RewardModel.load(tmp_path / "encoder")


def test_rewards_are_float32_whatever_the_weights_are() -> None:
    model = built("tiny-qwen3", loading=BackboneConfig(dtype="bfloat16"))
    assert isinstance(model.model.score, ScoreLayer)
    assert model.model.score.weight.dtype == torch.bfloat16
    rewards = model.scores(TEXTS)
    assert rewards.dtype == torch.float32
    assert not torch.equal(rewards.bfloat16().float(), rewards)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = built("tiny-qwen3")(model.tokenize(TEXTS))
    assert mixed.dtype == torch.float32
    assert not torch.equal(mixed.bfloat16().float(), mixed)


def test_messages_become_text() -> None:
    model = built("tiny-llama")
    text = "\n\nSystem: S\n\nHuman: U\n\nAssistant: A"
    assert dialogue_text(MESSAGES, model.tokenizer) == text
    assert torch.equal(model.scores([MESSAGES]), model.scores([text]))
    model.tokenizer.chat_template = "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    assert dialogue_text(MESSAGES, model.tokenizer) == "[system]S[user]U[assistant]A"
    (ids,) = [model.tokenize([MESSAGES]).ids.tolist()]
    assert ids.count(model.tokenizer.bos_token_id) == 1


def test_lengths_that_a_backbone_cannot_read(tmp_path: Path) -> None:
    for length in (0, 1025):
        with pytest.raises(InputError, match=f"'max_length': must lie between 1 and 1024.*got {length}"):
            build_reward_model("tiny-qwen3", length)
    assert build_reward_model("tiny-qwen3").tokenize.max_length == 256
    with pytest.raises(InputError, match="form must be one of merged, adapter, got 'zip'"):
        built("tiny-qwen3").save(tmp_path / "zip", "zip")
    with pytest.raises(InputError, match="no adapter to export"):
        built("tiny-qwen3").save(tmp_path / "adapter", "adapter")
    assert not list(tmp_path.iterdir())


def test_an_architecture_without_a_classifier(tmp_path: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    from lit_core.presets import preset_tokenizer

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    CLIPTextModel(CLIPTextConfig(vocab_size=4096, **sizes)).save_pretrained(tmp_path)
    preset_tokenizer("tiny-llama").save_pretrained(tmp_path)
    with pytest.raises(InputError, match="has no sequence classifier"):
        build_reward_model(str(tmp_path))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_a_quantised_model_is_exported_as_an_adapter(tmp_path: Path) -> None:
    from peft import AutoPeftModelForSequenceClassification

    model = built("tiny-qwen3", lora=Lora(r=4, dropout=0.0), quantization="nf4")
    with pytest.raises(InputError, match="cannot be merged"):
        model.save(tmp_path / "merged")
    expected = model.scores(TEXTS)
    model.save(tmp_path / "adapter", "adapter", "tiny-qwen3")
    plain: Any = AutoPeftModelForSequenceClassification.from_pretrained(tmp_path / "adapter", num_labels=1).eval()
    inputs = model.tokenizer(TEXTS[:4], padding=True, return_tensors="pt")
    torch.testing.assert_close(plain(**inputs).logits[:, 0], expected[:4], atol=1e-2, rtol=0)  # 4-bit products vary
    again = RewardModel.load(tmp_path / "adapter").scores(TEXTS)
    assert (again - expected).abs().max() < 0.5 * expected.std()  # merging rounds to the bits of the base


def test_chunk_sizes_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built("tiny-bert")
    expected = model.scores(TEXTS)
    monkeypatch.setattr(module, "CPU_CHUNK_TOKENS", 8)
    torch.testing.assert_close(model.scores(TEXTS, block=2), expected, atol=1e-5, rtol=0)
