"""Small models for tests of the engine, and what it draws in the plainest way."""

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from lit_core.generation import Request, SamplingParams
from lit_core.generation.sampling import choose, keys
from lit_core.presets import preset_config

NAMES = ("tiny-qwen3", "tiny-llama", "qwen2", "gpt2")
SMALL = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}


@cache
def model_of(name: str, small: bool = True) -> Any:
    """A model in evaluation mode whose predictions depend on the text: larger weights than the usual start.

    Presets keep their sizes unless they are to be small.
    """
    from transformers import AutoModelForCausalLM, GPT2Config, Qwen2Config

    sizes: dict[str, Any] = SMALL if small else {**SMALL, "vocab_size": 512, "hidden_size": 64}
    if name == "gpt2":
        config: Any = GPT2Config(vocab_size=sizes["vocab_size"], n_embd=sizes["hidden_size"], n_layer=2, n_head=4)
    elif name == "qwen2":
        config = Qwen2Config(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    else:
        config = preset_config(name, **(sizes | {"head_dim": 16} if small else {}))
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2 and not any(part in key for part in ("embed", "wte", "wpe")):
            parameter.data.mul_(6)
        elif "q_norm" in key or "k_norm" in key:
            parameter.data.uniform_(0.5, 2)
    return model


def prompts_of(count: int, longest: int = 20, vocabulary: int = 64, seed: int = 0) -> list[list[int]]:
    generator = random.Random(seed)
    return [generator.choices(range(vocabulary), k=generator.randint(1, longest)) for _ in range(count)]


@torch.no_grad()
def teacher_forced(model: Any, prompt: Sequence[int], response: Sequence[int]) -> Tensor:
    """Logits at each token of a response, from one forward pass ``(T, V)``."""
    ids = torch.tensor([[*prompt, *response]])
    return model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()


def log_probs_of(logits: Tensor, response: Sequence[int]) -> Tensor:
    return logits.log_softmax(-1).gather(1, torch.tensor(response)[:, None])[:, 0]


@torch.no_grad()
def token_by_token(model: Any, request: Request, params: SamplingParams) -> tuple[list[int], str]:
    """One response without any cache."""
    tokens = list(request.prefix)
    while len(tokens) < params.max_tokens:
        logits = model(input_ids=torch.tensor([[*request.prompt, *tokens]])).logits[:, -1]
        key = keys(torch.tensor([request.seed]), torch.tensor([len(tokens)]))
        tokens.append(int(choose(logits, key, params).tokens))
        if tokens[-1] in params.stop_ids:
            return tokens[len(request.prefix) :], "stop"
    return tokens[len(request.prefix) :], "length"
