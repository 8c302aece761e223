import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, GraniteConfig, GraniteForCausalLM, Qwen3ForCausalLM

from lit_core.backbones import BackboneConfig, Lora, text_model, unwrap
from lit_core.errors import InputError
from lit_core.generation import SamplingParams
from lit_core.lm_head import Truncation
from lit_core.presets import preset_config, preset_tokenizer
from lit_rl.functional.exploration import entropy, trust_region_entropy
from lit_rl.modules.layout import Layout, Sequences
from lit_rl.modules.policy import Policy
from lit_rl.modules.rollouts import draw
from lit_rl.modules.value import Critic, ValueHead
from lit_rl.problems import Problem, ProblemBatch

CPU = torch.device("cpu")
DRAW = random.Random(3)
PROMPTS = [[DRAW.randrange(900) for _ in range(length)] for length in (4, 9)]
RESPONSES = [[DRAW.randrange(900) for _ in range(length)] for length in (6, 2, 1, 5)]
SEQUENCES = Sequences([PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]], RESPONSES, [0, 1, 0, 1])
LORA = Lora(r=4, dropout=0.3)


def policy(backbone: str = "nano-qwen3", lora: Lora | None = None, **settings: Any) -> Policy:
    dtype = settings.pop("dtype", "float32")
    return Policy(backbone, BackboneConfig(dtype=dtype, seed=2), lora or Lora(), **settings)


def stirred(module: torch.nn.Module, scale: float = 0.1) -> None:
    """As after some training."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def plain_logits(model: Any, row: int, padding: int = 0) -> Tensor:
    """Logits before each response token, by the model's own forward pass, perhaps with padding on the right."""
    ids = [*SEQUENCES.prompts[row], *RESPONSES[row]]
    mask = torch.tensor([[1] * len(ids) + [0] * padding])
    logits = model(input_ids=torch.tensor([ids + [0] * padding]), attention_mask=mask).logits[0].float()
    start = len(SEQUENCES.prompts[row])
    return logits[start - 1 : start - 1 + len(RESPONSES[row])]


def plain_log_probs(model: Any, row: int, temperature: float, padding: int = 0) -> Tensor:
    logs = (plain_logits(model, row, padding) / temperature).log_softmax(-1)
    return logs.gather(1, torch.tensor(RESPONSES[row])[:, None]).squeeze(1)


@torch.no_grad()
def log_probs(policy: Policy, budget: int = 10_000, layout: Layout = "sorted", reference: bool = False) -> list[Tensor]:
    """Of each row's response."""
    found: dict[int, Tensor] = {}
    for chunk in SEQUENCES.chunks(range(4), budget, CPU, layout):
        targets = torch.tensor([token for row in chunk.rows for token in RESPONSES[row]])
        if reference:
            values = policy.reference_log_probs(chunk, targets)
        else:
            values = policy.log_probs(policy.states(chunk), targets).log_probs
        parts = values.split([len(RESPONSES[row]) for row in chunk.rows])
        found |= dict(zip(chunk.rows, parts, strict=True))
    return [found[row] for row in range(4)]


def completions(policy: Policy, temperature: float) -> list[Any]:
    batch = ProblemBatch([Problem(number, "countdown", "") for number in range(2)], PROMPTS)
    return draw(policy, batch, SamplingParams(temperature, max_tokens=8), 2, 11, 10_000)


@pytest.mark.parametrize("temperature", [1.0, 0.7, 1.6])
@pytest.mark.parametrize("backbone", ["nano-qwen3", "tiny-llama"])
def test_log_probs_are_those_of_the_whole_model_at_the_temperature(backbone: str, temperature: float) -> None:
    found = policy(backbone, temperature=temperature)
    stirred(found.model, 0.02)
    expected = [plain_log_probs(found.model, row, temperature, padding=3 * row) for row in range(4)]
    for layout, budget in (("sorted", 10_000), ("sorted", 1), ("shared", 10_000), ("shared", 1), ("trie", 10_000)):
        for one, other in zip(log_probs(found, budget, layout), expected, strict=True):  # type: ignore[arg-type]
            torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_engine_and_the_trainer_agree_in_training_mode(adapted: bool, temperature: float) -> None:
    found = policy(lora=LORA if adapted else None, temperature=temperature)
    stirred(found.model, 0.05)
    found.train()
    drawn = completions(found, temperature)
    assert all(module.training for module in found.modules())
    owners = [PROMPTS[0], PROMPTS[0], PROMPTS[1], PROMPTS[1]]
    sequences = Sequences(owners, [completion.tokens for completion in drawn], [0, 0, 1, 1])
    for chunk in sequences.chunks(range(4), 10_000, CPU, "shared"):
        targets = torch.tensor([token for row in chunk.rows for token in drawn[row].tokens])
        values = found.log_probs(found.states(chunk), targets).log_probs
        rolled = torch.cat([drawn[row].log_probs for row in chunk.rows])
        torch.testing.assert_close(values, rolled, atol=1e-5, rtol=0)


@pytest.mark.parametrize("adapted", [False, True], ids=["full", "adapters"])
def test_the_reference_keeps_the_starting_weights(adapted: bool) -> None:
    found = policy(lora=LORA if adapted else None, reference=True, temperature=0.8)
    start = log_probs(policy(temperature=0.8))
    trainable = [name for name, parameter in found.named_parameters() if parameter.requires_grad]
    stirred(found)
    for budget in (10_000, 1):
        for one, other in zip(log_probs(found, budget, reference=True), start, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    moved = log_probs(found)
    assert max(float((one - other).abs().max()) for one, other in zip(moved, start, strict=True)) > 0.01
    assert trainable == [name for name, parameter in found.named_parameters() if parameter.requires_grad]
    assert all(".lora_" in name if adapted else name.startswith("model.") for name in trainable)


def test_entropies_are_those_of_the_logits() -> None:
    found = policy(temperature=0.7)
    stirred(found.model, 0.2)
    (chunk,) = SEQUENCES.chunks(range(4), 10_000, CPU, "sorted")
    targets = torch.tensor([token for row in chunk.rows for token in RESPONSES[row]])
    logits = torch.cat([plain_logits(found.model, row) for row in chunk.rows]) / 0.7
    for truncation in (Truncation(top_k=3), Truncation(top_p=0.6, cap=50)):
        values = found.log_probs(found.states(chunk), targets, True, truncation)
        torch.testing.assert_close(values.entropy, entropy(logits), atol=1e-4, rtol=0)
        expected = trust_region_entropy(logits, truncation.top_k, truncation.top_p, "none", 50)
        torch.testing.assert_close(values.truncated_entropy, expected, atol=1e-4, rtol=0)


@pytest.fixture(scope="module")
def dropping(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Backbones whose settings ask for dropout, as modules, as numbers and inside attention."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("dropping")
    sizes: dict[str, Any] = {"vocab_size": 1024, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    drops = {"resid_pdrop": 0.4, "embd_pdrop": 0.4, "attn_pdrop": 0.4}
    GPT2LMHeadModel(GPT2Config(**sizes, **drops)).save_pretrained(folder / "gpt2")
    Qwen3ForCausalLM(preset_config("nano-qwen3", attention_dropout=0.4)).save_pretrained(folder / "qwen3")
    for name in ("gpt2", "qwen3"):
        preset_tokenizer("nano-qwen3").save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("gpt2", "qwen3")}


@pytest.mark.parametrize("name", ["gpt2", "qwen3"])
def test_dropout_is_off(dropping: dict[str, str], name: str) -> None:
    found = policy(dropping[name], reference=True)
    critic = Critic(dropping[name], BackboneConfig(), Lora())
    torch.nn.init.normal_(critic.head.linear.weight)
    still = log_probs(found.eval())
    (chunk,) = SEQUENCES.chunks(range(4), 10_000, CPU, "sorted")
    values = critic.eval()(chunk)
    found.train()
    for reference in (False, True):
        for one, other in zip(log_probs(found, reference=reference), still, strict=True):
            torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    torch.testing.assert_close(critic.train()(chunk), values, atol=1e-6, rtol=0)
    drawn = completions(found, 1.0)
    logits = found.model(input_ids=torch.tensor([[*PROMPTS[0], *drawn[0].tokens]])).logits[0, len(PROMPTS[0]) - 1 : -1]
    expected = logits.log_softmax(-1).gather(1, torch.tensor(drawn[0].tokens)[:, None]).squeeze(1)
    torch.testing.assert_close(drawn[0].log_probs, expected, atol=1e-5, rtol=0)


def test_bfloat16_weights_give_float32_log_probs() -> None:
    found = policy(dtype="bfloat16")
    for layout in ("sorted", "shared", "trie"):
        values = log_probs(found, layout=layout)  # type: ignore[arg-type]
        exact = log_probs(policy())
        assert all(value.dtype == torch.float32 for value in values)
        for one, other in zip(values, exact, strict=True):
            torch.testing.assert_close(one, other, atol=0.1, rtol=0)


def test_values_are_read_before_each_token(dropping: dict[str, str]) -> None:
    critic = Critic("nano-qwen3", BackboneConfig(seed=2), Lora())
    (chunk,) = SEQUENCES.chunks(range(4), 10_000, CPU, "shared")
    assert torch.equal(critic(chunk), torch.zeros(14))  # at the start
    torch.nn.init.normal_(critic.head.linear.weight)
    torch.nn.init.constant_(critic.head.linear.bias, 0.5)
    expected = []
    for row in chunk.rows:
        ids = torch.tensor([[*SEQUENCES.prompts[row], *RESPONSES[row]]])
        states = text_model(critic.model)(input_ids=ids).last_hidden_state[0]
        start = len(SEQUENCES.prompts[row])
        expected.append(states[start - 1 : start - 1 + len(RESPONSES[row])] @ critic.head.linear.weight[0] + 0.5)
    torch.testing.assert_close(critic(chunk), torch.cat(expected), atol=1e-5, rtol=0)
    head = ValueHead(8).to(torch.bfloat16)
    assert head(torch.ones(3, 8)).dtype == torch.float32


def test_end_tokens_are_those_of_tokenizer_and_generation_settings() -> None:
    found = policy()
    end = found.tokenizer.eos_token_id
    unwrap(found.model).generation_config.eos_token_id = [7, end, 9]
    assert found.end_ids == (end, 7, 9)
    unwrap(found.model).generation_config.eos_token_id = None
    assert found.end_ids == (end,)


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")  # peft's advice on adapters of a tied head
def test_a_model_whose_logits_are_not_its_heads_product_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="causal language model with a plain head, 'tiny-bert' has none"):
        policy("tiny-bert")
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 1024}
    settings = GraniteConfig(num_attention_heads=1, num_key_value_heads=1, logits_scaling=8.0, **sizes)
    GraniteForCausalLM(settings).save_pretrained(tmp_path)
    preset_tokenizer("nano-qwen3").save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"not a plain product: logits_scaling is 8\.0"):
        policy(str(tmp_path))
    with pytest.raises(InputError, match="adapters on the language-model head are not read"):
        policy(lora=Lora(r=2, targets=["q_proj", "lm_head"]))


def test_only_plain_attention_shares_prompts(dropping: dict[str, str]) -> None:
    assert policy().shares_prompts
    assert policy(lora=LORA).shares_prompts
    assert not policy(dropping["gpt2"]).shares_prompts
    found = policy()
    found.model.config._attn_implementation = "flash_attention_2"
    assert not found.shares_prompts
