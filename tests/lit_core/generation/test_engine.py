import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from engine_models import NAMES, log_probs_of, model_of, prompts_of, teacher_forced, token_by_token
from scipy.stats import chisquare
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, load_backbone
from lit_core.errors import InputError
from lit_core.generation import Completion, Request, SamplingParams, TorchEngine, engine
from lit_core.generation.shared_cache import SharedCache, _filled_gaps


def texts(completions: Sequence[Completion]) -> list[list[int]]:
    return [completion.tokens for completion in completions]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_greedy_responses_are_those_of_generate(name: str) -> None:
    model = model_of(name, small=False)
    prompts = prompts_of(64, longest=60, vocabulary=512)
    found = texts(TorchEngine(model).generate(prompts, SamplingParams(temperature=0, max_tokens=16)))
    for prompt, response in zip(prompts, found, strict=True):
        ids = torch.tensor([prompt])
        expected = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=16, pad_token_id=0
        )
        assert response == expected[0, len(prompt) :].tolist()
    assert len({tuple(response) for response in found}) > 50  # the model does not say the same thing to all


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kv_tokens", [45, 130, 1 << 18])
def test_responses_are_those_of_sampling_without_a_cache(name: str, kv_tokens: int) -> None:
    """Prompts of one token, prefixes of several lengths, several stop ids; rows wait, leave and take others' places."""
    generator = random.Random(1)
    prompts = [[7], *prompts_of(6)]
    requests = [
        Request(prompt, generator.getrandbits(63), generator.choices(range(64), k=generator.choice([0, 0, 3, 11])))
        for prompt in prompts
        for _ in range(5)
    ]
    generator.shuffle(requests)
    params = SamplingParams(temperature=0.9, top_k=30, max_tokens=12, stop_ids=(3, 40, 63, 1000))
    rollouts = TorchEngine(model_of(name), kv_tokens=kv_tokens)
    assert rollouts.shared == (name != "gpt2")
    found = rollouts.run(requests, params)
    expected = [token_by_token(model_of(name), request, params) for request in requests]
    assert [(completion.tokens, completion.finish_reason) for completion in found] == expected
    assert {reason for _, reason in expected} == {"stop", "length"}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_are_those_of_a_forward_pass(name: str, temperature: float) -> None:
    prompts = prompts_of(8)
    for generic in (False, True):
        rollouts = TorchEngine(model_of(name), generic=generic)
        found = rollouts.generate(prompts, SamplingParams(temperature=temperature, max_tokens=10))
        for prompt, completion in zip(prompts, found, strict=True):
            expected = teacher_forced(model_of(name), prompt, completion.tokens) / temperature
            torch.testing.assert_close(
                completion.log_probs, log_probs_of(expected, completion.tokens), atol=1e-4, rtol=0
            )


def test_frequencies_are_the_probabilities() -> None:
    count, model = 8000, model_of("tiny-llama")
    found = TorchEngine(model).generate([[5, 9, 2]], SamplingParams(temperature=1.5, max_tokens=1), samples=count)
    observed = torch.tensor([completion.tokens[0] for completion in found]).bincount(minlength=64).double()
    expected = count * (teacher_forced(model, [5, 9, 2], [0])[0].double() / 1.5).softmax(0)
    assert float(expected.min()) > 5
    assert chisquare(observed, expected).pvalue > 0.01


def test_a_request_gets_the_same_response_in_any_company() -> None:
    prompts = prompts_of(8)
    requests = [Request(prompt, 100 * row + sample) for row, prompt in enumerate(prompts) for sample in range(8)]
    params = SamplingParams(max_tokens=12, stop_ids=(1, 2, 3, 4))
    model = model_of("tiny-qwen3")
    state = torch.get_rng_state()
    together = texts(TorchEngine(model).run(requests, params))
    assert torch.equal(torch.get_rng_state(), state)
    assert together == [TorchEngine(model).run([request], params)[0].tokens for request in requests]
    assert together == texts(TorchEngine(model, kv_tokens=100).run(requests, params))  # they wait, a group in parts
    assert together == texts(TorchEngine(model, kv_tokens=400).run(requests[::-1], params))[::-1]


def test_samples_differ_and_depend_on_the_seed() -> None:
    rollouts, params = TorchEngine(model_of("qwen2")), SamplingParams(max_tokens=10)
    found = [texts(rollouts.generate([[1, 2]], params, samples=8, seeds=seed)) for seed in (0, 0, 1)]
    assert len({tuple(response) for response in found[0]}) == 8
    assert found[0] == found[1]
    assert all(one != other for one, other in zip(found[0], found[2], strict=True))


@pytest.mark.parametrize("name", ["tiny-qwen3", "gpt2"])
def test_a_response_goes_on_from_its_first_tokens(name: str) -> None:
    rollouts, params = TorchEngine(model_of(name)), SamplingParams(max_tokens=12)
    prompts = prompts_of(3)
    whole = rollouts.generate(prompts, params, samples=4, seeds=5)
    for known in (1, 7, 11):
        rest = rollouts.generate(prompts, params, 4, 5, prefixes=[completion.tokens[:known] for completion in whole])
        assert texts(rest) == [completion.tokens[known:] for completion in whole]
        for one, other in zip(rest, whole, strict=True):
            torch.testing.assert_close(one.log_probs, other.log_probs[known:], atol=1e-5, rtol=0)


def test_scalars_of_the_hook_are_kept_with_the_tokens() -> None:
    def hook(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        probabilities = logits.softmax(-1)
        return {"entropy": -(probabilities * probabilities.log()).sum(-1), "token": tokens}

    model, prompts = model_of("tiny-qwen3"), prompts_of(6)
    params = SamplingParams(max_tokens=9, stop_ids=(1, 2, 3, 4, 5))
    found = TorchEngine(model, kv_tokens=120).generate(prompts, params, samples=3, hook=hook)
    assert len({len(completion.tokens) for completion in found}) > 2
    for number, completion in enumerate(found):
        logs = teacher_forced(model, prompts[number // 3], completion.tokens).log_softmax(-1)
        torch.testing.assert_close(completion.scalars["entropy"], -(logs.exp() * logs).sum(-1), atol=1e-4, rtol=0)
        assert completion.scalars["token"].tolist() == completion.tokens


def test_adapters_take_part() -> None:
    model: Any = load_backbone("tiny-qwen3", "causal_lm", lora=Lora(r=4))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    prompts = prompts_of(4)
    found = TorchEngine(model).generate(prompts, SamplingParams(max_tokens=8))
    model.eval()
    for prompt, completion in zip(prompts, found, strict=True):
        expected = log_probs_of(teacher_forced(model, prompt, completion.tokens), completion.tokens)
        torch.testing.assert_close(completion.log_probs, expected, atol=1e-4, rtol=0)
        with model.disable_adapter():
            plain = log_probs_of(teacher_forced(model, prompt, completion.tokens), completion.tokens)
        assert float((expected - plain).abs().max()) > 0.1


def test_end_tokens_belong_to_the_response() -> None:
    rollouts, prompt = TorchEngine(model_of("tiny-llama")), [4, 8, 15]
    free = rollouts.generate([prompt], SamplingParams(max_tokens=10), seeds=3)[0]
    assert (len(free.tokens), free.finish_reason) == (10, "length")
    end = free.tokens[4]
    length = free.tokens.index(end) + 1
    unused = next(token for token in range(64) if token not in free.tokens)
    ended = rollouts.generate([prompt], SamplingParams(max_tokens=10, stop_ids=(unused, end)), seeds=3)[0]
    assert (ended.tokens, ended.finish_reason) == (free.tokens[:length], "stop")
    assert torch.equal(ended.log_probs, free.log_probs[:length])


@pytest.mark.parametrize("generic", [False, True])
def test_the_model_comes_back_as_it_was(generic: bool) -> None:
    model: Any = load_backbone(
        "tiny-llama", "causal_lm", BackboneConfig(gradient_checkpointing=True), Lora(r=4, dropout=0.5)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.train()
    frozen = model.get_base_model().model.layers[1]
    frozen.eval()
    modes = [module.training for module in model.modules()]
    rollouts, params = TorchEngine(model, generic=generic), SamplingParams(max_tokens=6)
    found = rollouts.generate([[1, 2, 3]], params, samples=3)
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(RuntimeError, match="broken"):
        rollouts.generate([[1, 2, 3]], params, hook=_broken)
    assert [module.training for module in model.modules()] == modes
    model.eval()
    assert texts(found) == texts(rollouts.generate([[1, 2, 3]], params, samples=3))  # no dropout in the first
    model.train()
    assert not found[0].log_probs.is_inference()  # a loss may use them
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def _broken(logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
    raise RuntimeError("broken")


@pytest.mark.parametrize("generic", [False, True])
def test_autocast_and_inference_mode_change_nothing(generic: bool) -> None:
    rollouts, params = TorchEngine(model_of("tiny-qwen3"), generic=generic), SamplingParams(max_tokens=8)
    plain = rollouts.generate(prompts_of(4), params, samples=2)
    contexts: list[Callable[[], Any]] = [lambda: torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode]
    for context in contexts:
        with context():
            found = rollouts.generate(prompts_of(4), params, samples=2)
        assert texts(found) == texts(plain)
        for one, other in zip(found, plain, strict=True):
            assert one.log_probs.dtype == torch.float32
            assert torch.equal(one.log_probs, other.log_probs)


def test_bfloat16_models_with_adapters_in_float32() -> None:
    model = load_backbone("tiny-qwen3", "causal_lm", BackboneConfig(dtype="bfloat16"), Lora(r=4)).eval()
    prompts = prompts_of(4)
    for generic in (False, True):
        found = TorchEngine(model, generic=generic).generate(prompts, SamplingParams(max_tokens=8))
        for prompt, completion in zip(prompts, found, strict=True):
            expected = log_probs_of(teacher_forced(model, prompt, completion.tokens), completion.tokens)
            torch.testing.assert_close(completion.log_probs, expected, atol=0.05, rtol=0)


def test_the_cache_keeps_to_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    class Watched(SharedCache):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            shapes = (self.prompt_cache[0].shape, self.cache[0].shape)  # (2, slots, heads, tokens, width)
            sizes.append(sum(shape[1] * shape[3] for shape in shapes))

    monkeypatch.setattr(engine, "SharedCache", Watched)
    prompts = [[token] * 10 for token in range(12)]
    for kv_tokens in (18, 40, 100, 300, 10_000):
        TorchEngine(model_of("qwen2"), kv_tokens=kv_tokens).generate(prompts, SamplingParams(max_tokens=8), samples=4)
        assert sizes.pop() <= min(kv_tokens, 12 * 10 + 48 * 8)


def test_the_last_rows_fill_the_gaps() -> None:
    assert _filled_gaps([1, 2, 5, 6]) == [5, 1, 2, 6]
    assert _filled_gaps([0, 1]) == [0, 1]
    assert _filled_gaps([]) == []


def test_nothing_to_draw() -> None:
    assert TorchEngine(model_of("gpt2")).generate([], SamplingParams()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": [[1], []]}, "a prompt needs at least one token"),
        ({"prompts": [[1, 64]]}, r"the model has tokens 0 to 63, got 64"),
        ({"samples": 0}, "field 'samples': must be at least 1, got 0"),
        ({"seeds": [1, 2, 3]}, "need 2 seeds and prefixes, got 3 and 2"),
        ({"prefixes": [[1]]}, "need 2 seeds and prefixes, got 2 and 1"),
        ({"prefixes": [[1], [1] * 8]}, "a prefix of 8 tokens leaves nothing of 8 to draw"),
        ({"params": SamplingParams(max_tokens=8, stop_strings=("x",))}, "stop strings need a tokenizer"),
        ({"params": SamplingParams(max_tokens=38)}, r"field 'kv_tokens': the cache holds 40 tokens; .* need 41"),
    ],
)
def test_mistakes(arguments: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {"prompts": [[1, 2, 3], [4]], "params": SamplingParams(max_tokens=8)} | arguments
    with pytest.raises(InputError, match=message):
        TorchEngine(model_of("qwen2"), kv_tokens=40).generate(**given)


def test_models_that_cannot_draw() -> None:
    with pytest.raises(InputError, match="Qwen3Model has no language-model head"):
        TorchEngine(load_backbone("tiny-qwen3"))
    with pytest.raises(InputError, match="field 'kv_tokens': must be at least 1, got 0"):
        TorchEngine(model_of("qwen2"), kv_tokens=0)
    broken: Any = load_backbone("tiny-qwen3", "causal_lm")
    broken.get_input_embeddings().weight.data[9] = torch.nan
    with pytest.raises(InputError, match="logits are not finite"):
        TorchEngine(broken).generate([[1, 2]], SamplingParams(max_tokens=3))
