from pathlib import Path
from typing import Any

import pytest
import torch

from lit_core.backbones import Lora
from lit_core.errors import InputError
from lit_core.tokens import Tokens
from lit_embed.methods.causal_lm import CausalLM

TEXTS = [{"text": text} for text in ("the 42", "a longer text about a vessel", "over-long " * 30)]


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-llama"])
def module(request: pytest.FixtureRequest) -> CausalLM:
    built = CausalLM(request.param, length=16)
    built.configure_model()
    return built


def test_texts_end_with_the_end_token(module: CausalLM) -> None:
    batch = module.lm_collator()(TEXTS)
    assert max(batch.lengths) == 16
    ends = [row[-1].item() for row in batch.ids.split(batch.lengths)]
    assert ends == [module.tokenizer.eos_token_id] * 3
    assert module.batch_tokens(batch) == sum(batch.lengths)


@torch.no_grad()
def test_the_loss_is_that_of_transformers(module: CausalLM) -> None:
    batch: Tokens = module.lm_collator()(TEXTS)
    ids, mask = batch.pad([0, 1, 2], module.tokenizer.pad_token_id)
    model: Any = module.model
    expected = model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    torch.testing.assert_close(module(batch), expected, rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # peft 0.21 on transformers 5.23
def test_export_loads_with_transformers(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    built = CausalLM("tiny-llama", lora=Lora(r=2))
    built.configure_model()
    for name, parameter in built.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    built.eval()
    ids = torch.tensor([[5, 6, 7]])
    for form in ("merged", "adapter"):
        built.export(tmp_path / form, form)
        loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / form).eval()
        torch.testing.assert_close(loaded(input_ids=ids).logits, built.model(input_ids=ids).logits, atol=1e-5, rtol=0)
        assert AutoTokenizer.from_pretrained(tmp_path / form).pad_token == "<pad>"
    with pytest.raises(InputError, match="the output folder exists and is not empty"):
        built.export(tmp_path / "merged")
