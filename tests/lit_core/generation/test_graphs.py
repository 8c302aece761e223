import random
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from lit_core.backbones import BackboneConfig, Lora, load_backbone
from lit_core.errors import InputError
from lit_core.generation import Completion, Request, SamplingParams, TorchEngine, engine
from lit_core.generation.graphs import CAPTURE_AT, CudaCapture, Layout, StepGraphs, obstacle, rounded
from lit_core.generation.shared_cache import SharedCache
from lit_core.presets import preset_config

READS_VALUES = ("_local_scalar_dense", "nonzero", "masked_select", "unique")  # a GPU's host would wait for these


class Recorder(TorchDispatchMode):
    """Capture for a CPU: keeps the operations of a call and does them again on the same tensors, without its Python."""

    def __init__(self, calls: list[Any]) -> None:
        super().__init__()
        self.calls = calls

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert not any(name in str(func) for name in READS_VALUES), func
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result


def recorded(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    calls: list[Any] = []
    with Recorder(calls):
        result = call()

    def replay() -> Tensor:
        for func, args, kwargs, old in calls:
            new = func(*args, **kwargs)
            pairs = [(old, new)] if isinstance(old, Tensor) else zip(old, new, strict=True)
            for there, found in pairs:
                if there.data_ptr() != found.data_ptr():  # else a view, or an operation in place
                    there.copy_(found)
        return result

    return replay


class Captures:
    """Counts what another capture records."""

    def __init__(self, capture: Callable[[Any], Any] = recorded) -> None:
        self.capture, self.count = capture, 0

    def __call__(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        self.count += 1
        return self.capture(call)


def model_of(name: str = "tiny-qwen3") -> Any:
    """Larger weights than the usual start; few tokens, so that 1e-6 is more than a rounding of their log-probs."""
    from transformers import AutoModelForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "head_dim": 16}
    config: Any = preset_config(name, **sizes)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    for key, parameter in model.named_parameters():
        if parameter.ndim == 2 and "embed" not in key:
            parameter.data.mul_(3)
    return model


def requests_of() -> list[Request]:
    """Groups of several sizes and lengths of prompt, some with a prefix."""
    generator = random.Random(0)
    requests = []
    for size in (1, 3, 5, 2, 4, 1):
        prompt = generator.choices(range(64), k=generator.randint(1, 70))
        prefix = generator.choices(range(64), k=generator.choice([0, 2]))
        requests += [Request(prompt, generator.getrandbits(63), prefix) for _ in range(size)]
    return requests


def run_with(monkeypatch: pytest.MonkeyPatch, capture: Any, model: Any, *arguments: Any, **settings: Any) -> Any:
    def cache_of(*given: Any) -> SharedCache:
        return SharedCache(*given[:5], capture)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "SharedCache", cache_of)
        return TorchEngine(model, **settings).run(*arguments)


def assert_same(found: Sequence[Completion], expected: Sequence[Completion], tolerance: float = 1e-6) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    assert [one.finish_reason for one in found] == [one.finish_reason for one in expected]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.log_probs, other.log_probs, atol=tolerance, rtol=1e-6)


@pytest.mark.parametrize("name", ["tiny-qwen3", "tiny-llama"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("kv_tokens", [600, 1 << 18])
def test_replayed_steps_draw_what_plain_ones_do(
    monkeypatch: pytest.MonkeyPatch, name: str, temperature: float, kv_tokens: int
) -> None:
    """Rows leave at stop ids, others wait for their places, some reach the largest length; two lengths of caches."""
    model = model_of(name)
    params = SamplingParams(temperature, max_tokens=70, stop_ids=(3, 40))
    requests, captures = requests_of(), Captures()
    expected = TorchEngine(model, kv_tokens=kv_tokens).run(requests, params)
    found = run_with(monkeypatch, captures, model, requests, params, kv_tokens=kv_tokens)
    assert_same(found, expected)
    if temperature > 0:  # greedy ones soon repeat themselves
        assert {completion.finish_reason for completion in expected} == {"stop", "length"}
        assert len({len(completion.tokens) for completion in expected}) > 3
    assert captures.count > 1


@torch.inference_mode()
def test_rows_of_padding_leave_the_others_caches_alone() -> None:
    """5 rows of 3 prompts are padded to 8 and 4; the caches agree, and beyond the padded row nothing is written."""
    model, prompts, counts = model_of(), [[1, 2, 3], [4], [5, 6]], [2, 1, 2]
    plain, padded = SharedCache(model, 6, 10, 3, 9), SharedCache(model, 6, 10, 3, 9, recorded)
    tokens = plain.admit(prompts, counts).argmax(-1)
    torch.testing.assert_close(padded.admit(prompts, counts).argmax(-1), tokens)
    assert (len(padded.held), padded.layout.prompt_mask.shape) == (8, (4, 1, 1, 3))
    for step in range(8):
        logits = plain.step(tokens)
        torch.testing.assert_close(padded.step(tokens), logits, atol=1e-5, rtol=0)
        tokens = logits.argmax(-1)
        if step == 4:
            for cache in (plain, padded):
                assert cache.keep([0, 3, 4]) == [0, 3, 4]
            tokens = tokens[[0, 3, 4]]
    for one, other in zip(plain.cache, padded.cache, strict=True):
        torch.testing.assert_close(other[:, :3], one[:, :3], atol=1e-5, rtol=0)
        assert not other[:, 8:].any()
    for one, other in zip(plain.prompt_cache, padded.prompt_cache, strict=True):
        assert torch.equal(one, other)
    assert padded.graphs is not None
    assert len(padded.graphs.recorded) == 2


@torch.inference_mode()
def test_full_caches_are_not_padded_beyond_their_slots() -> None:
    model = model_of()
    cache = SharedCache(model, 3, 5, 3, 4, recorded)
    cache.admit([[1, 2, 3], [4], [5, 6]], [2, 1, 2])
    assert (len(cache.held), len(cache.layout.prompt_mask)) == (5, 3)


def layout(size: int) -> Layout:
    return Layout(*(torch.full((size,), value) for value in (1.0, 2.0, 3.0, 4.0)))


def summed(states: Tensor, held: Tensor, layout: Layout, length: int) -> Tensor:
    return states * length + held + sum(layout)


def test_a_shape_is_captured_at_its_third_use_and_the_oldest_one_leaves() -> None:
    captures = Captures()
    graphs = StepGraphs(captures, most=2)

    def use(size: int, times: int = 1) -> None:
        for _ in range(times):
            states, given = torch.randn(size), layout(size)
            expected = states * 7 + 1 + 10
            assert torch.equal(graphs(summed, states, torch.ones(size), given, 7), expected)

    use(2, CAPTURE_AT - 1)
    assert captures.count == 0
    use(2, 4)
    assert captures.count == 1
    use(3, CAPTURE_AT)
    use(2)
    use(4, CAPTURE_AT)  # size 3 leaves, as 2 was used since
    assert (captures.count, len(graphs.recorded)) == (3, 2)
    use(2, 3)
    assert captures.count == 3
    use(3, CAPTURE_AT - 1)
    assert captures.count == 3  # counted from the start again
    use(3)
    assert captures.count == 4


def test_a_layout_is_copied_where_it_is_another_one() -> None:
    graphs, first, second = StepGraphs(recorded), layout(2), layout(2)
    second.offsets.fill_(100)
    zero = torch.zeros(2)
    found = [float(graphs(summed, zero, zero, given, 1)[0]) for given in [first] * 4 + [second, second, first]]
    assert found == [10] * 4 + [109, 109, 10]


@pytest.mark.parametrize(
    ("size", "expected"), [(1, 1), (3, 4), (33, 64), (64, 64), (65, 80), (128, 128), (129, 160), (1025, 1280)]
)
def test_sizes_are_rounded_up(size: int, expected: int) -> None:
    assert rounded(size) == expected


def test_a_capture_that_fails_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(call: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    model, captures = model_of(), Captures(failing)
    requests, params = requests_of(), SamplingParams(max_tokens=70)
    with pytest.warns(UserWarning, match="without CUDA graphs, as a capture failed: operation not permitted") as told:
        found = run_with(monkeypatch, captures, model, requests, params)
    assert (captures.count, len(told)) == (1, 1)
    assert_same(found, TorchEngine(model).run(requests, params))


@torch.inference_mode()
def test_graphs_and_cache_die_together() -> None:
    def capture(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        result = call()
        return lambda: result

    cache = SharedCache(model_of(), 1, 2, 3, 9, capture)
    cache.admit([[1, 2]], [2])
    for _ in range(CAPTURE_AT + 1):
        cache.step(torch.tensor([3, 4]))
    assert cache.graphs is not None
    assert len(cache.graphs.recorded) == 1
    gone = weakref.ref(cache)
    del cache
    assert gone() is None  # at once: the memory is needed for training


def hooked(model: Any) -> None:
    model.model.layers[1].mlp.register_forward_hook(lambda *_: None)


def replaced(model: Any) -> None:
    model.model.layers[0].mlp.forward = model.model.layers[0].mlp.forward


def checkpointed(model: Any) -> None:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model.model.layers[0].mlp = checkpoint_wrapper(model.model.layers[0].mlp)


def subclassed(model: Any) -> None:
    class Packed(nn.Parameter):
        pass

    projection = model.model.layers[0].self_attn.q_proj
    projection.weight = Packed(projection.weight.data)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (hooked, "layers.1.mlp has hooks"),
        (replaced, "layers.0.mlp has had its forward replaced"),
        (checkpointed, "layers.0.mlp is wrapped for activation checkpointing"),
        (subclassed, "weights are Packed"),
    ],
)
def test_layers_that_must_not_be_captured(change: Callable[[Any], None], reason: str) -> None:
    model: Any = load_backbone("tiny-qwen3", "causal_lm")
    assert obstacle(model) is None
    change(model)
    assert obstacle(model) == reason


def test_quantised_layers_must_not_be_captured() -> None:
    pytest.importorskip("bitsandbytes")
    model = load_backbone("tiny-qwen3", "causal_lm", lora=Lora(r=4), quantization="nf4")
    assert obstacle(model) == "layers.0.self_attn.q_proj.base_layer is quantised"


def test_sharded_layers_must_not_be_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class Sharded(nn.Linear):
        pass

    model: Any = load_backbone("tiny-qwen3", "causal_lm")
    model.extra = Sharded(1, 1)
    monkeypatch.setattr("torch.distributed.fsdp.FSDPModule", Sharded)
    assert obstacle(model) == "its weights are sharded, and gathered only for a time"


def test_adapters_and_recomputed_activations_may_be_captured() -> None:
    config = BackboneConfig(gradient_checkpointing=True)
    assert obstacle(load_backbone("tiny-llama", "causal_lm", config, Lora(r=4, dropout=0.5))) is None


def test_graphs_that_cannot_be() -> None:
    model: Any = load_backbone("tiny-qwen3", "causal_lm")
    with pytest.raises(InputError, match="field 'graphs': decode steps cannot be captured: the model is on cpu"):
        TorchEngine(model, graphs=True)
    with pytest.raises(InputError, match="the model runs through its own cache"):
        TorchEngine(model, generic=True, graphs=True)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graphs_on_a_gpu_give_what_their_step_gives(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """The same kernels on the same shapes: equal to the padded step that is not captured."""
    model = model_of().to("cuda", dtype)
    requests = requests_of()
    params = SamplingParams(max_tokens=80, stop_ids=(3, 40))
    captures = Captures(CudaCapture(torch.device("cuda", torch.cuda.current_device())))
    plain = Captures(lambda call: call)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = run_with(monkeypatch, captures, model, requests, params)
    assert_same(found, run_with(monkeypatch, plain, model, requests, params))
    assert captures.count == plain.count > 1
    if dtype == torch.float32:  # other shapes, so other kernels
        assert_same(TorchEngine(model, graphs=True).run(requests, params), found, 1e-4)
        assert_same(TorchEngine(model, graphs=False).run(requests, params), found, 1e-4)
