from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lit_core.backbones import Lora
from lit_core.tokens import Tokens
from lit_embed.functional.losses import info_nce
from lit_embed.modules.encoder import Encoder, build_encoder
from lit_embed.modules.gradcache import cached_backward
from lit_embed.modules.tokenization import EncoderConfig

SAME_LENGTH, MIXED = [6] * 12, [3, 11, 5, 5, 2, 9, 4, 7, 13, 1, 6, 8]


def _tokens(lengths: list[int]) -> Tokens:
    generator = torch.Generator().manual_seed(0)
    return Tokens(torch.randint(5, 4000, (sum(lengths),), generator=generator), lengths)


def _loss(vectors: Tensor) -> Tensor:
    return info_nce(vectors[:4], vectors[4:], temperature=0.1)


def _gradients(encoder: Encoder, step: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    encoder.zero_grad()
    loss = step()
    return loss, {name: p.grad.clone() for name, p in encoder.named_parameters() if p.grad is not None}


def _relative(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    error = sum(float((found[name] - value).pow(2).sum()) for name, value in expected.items())
    return (error / sum(float(value.pow(2).sum()) for value in expected.values())) ** 0.5


def _plain(encoder: Encoder, tokens: Tokens) -> Tensor:
    loss = _loss(encoder(tokens))
    loss.backward()
    return loss.detach()


@pytest.fixture(scope="module", params=["tiny-qwen3", "tiny-bert"])
def still(request: pytest.FixtureRequest) -> Encoder:
    """Without dropout, because evaluation mode has gradients too."""
    return build_encoder(request.param).eval()


@pytest.mark.parametrize(
    ("lengths", "budget", "chunks"), [(SAME_LENGTH, 6, 12), (SAME_LENGTH, 18, 4), (SAME_LENGTH, 48, 2), (MIXED, 12, 8)]
)
def test_the_gradient_is_that_of_the_plain_step(
    still: Encoder, lengths: list[int], budget: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = _tokens(lengths)
    monkeypatch.setattr(still.config, "chunk_tokens", 10_000)
    loss, expected = _gradients(still, lambda: _plain(still, tokens))
    monkeypatch.setattr(still.config, "chunk_tokens", budget)
    backwards: list[Tensor] = []

    def backward(value: Tensor) -> None:
        backwards.append(value)
        value.backward()

    cached, found = _gradients(still, lambda: cached_backward(still, tokens, _loss, backward))
    assert len(backwards) == chunks
    torch.testing.assert_close(cached, loss, atol=1e-6, rtol=0)
    assert not cached.requires_grad
    assert _relative(found, expected) < 1e-5


@pytest.mark.parametrize(("name", "lora"), [("tiny-bert", None), ("tiny-qwen3", Lora(r=4, dropout=0.4))])
def test_dropout_is_replayed(name: str, lora: Lora | None) -> None:
    """A plain step over the same chunks from the same random state draws the same dropout."""
    encoder = build_encoder(name, EncoderConfig(chunk_tokens=12), lora=lora).train()
    for parameter_name, parameter in encoder.named_parameters():
        if "lora_B" in parameter_name:
            torch.nn.init.normal_(parameter, std=0.05)
    tokens = _tokens(MIXED)
    torch.manual_seed(5)
    loss, expected = _gradients(encoder, lambda: _plain(encoder, tokens))
    after = torch.get_rng_state()
    torch.manual_seed(5)
    cached, found = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
    torch.testing.assert_close(cached, loss, atol=1e-6, rtol=0)
    assert _relative(found, expected) < 1e-5
    assert torch.equal(torch.get_rng_state(), after)  # as if every chunk had been encoded once
    other, _ = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
    assert abs(float(other - loss)) > 1e-3  # there is dropout


def test_draws_of_the_loss_come_after_those_of_the_encoder() -> None:
    encoder = build_encoder("tiny-qwen3", EncoderConfig(chunk_tokens=12)).eval()
    drawn: list[float] = []

    def loss_of(vectors: Tensor) -> Tensor:
        drawn.append(float(torch.rand(())))
        return _loss(vectors)

    torch.manual_seed(5)
    expected = torch.rand(2).tolist()
    torch.manual_seed(5)
    cached_backward(encoder, _tokens(MIXED), loss_of)
    assert [*drawn, float(torch.rand(()))] == expected


def test_frozen_weights_get_no_gradient_and_gradients_accumulate() -> None:
    encoder = build_encoder("tiny-qwen3", EncoderConfig(chunk_tokens=12)).eval()
    encoder.model.get_input_embeddings().requires_grad_(False)
    tokens = _tokens(MIXED)
    _, once = _gradients(encoder, lambda: cached_backward(encoder, tokens, _loss))
    assert all("embed_tokens" not in name for name in once)
    cached_backward(encoder, tokens, _loss)
    for name, parameter in encoder.named_parameters():
        if name in once:
            torch.testing.assert_close(parameter.grad, 2 * once[name], rtol=1e-4, atol=1e-7)


def test_outer_scaling_reaches_the_gradient(still: Encoder) -> None:
    tokens = _tokens(MIXED)
    _, once = _gradients(still, lambda: cached_backward(still, tokens, _loss))
    _, thrice = _gradients(still, lambda: cached_backward(still, tokens, lambda vectors: 3 * _loss(vectors)))
    assert _relative(thrice, {name: 3 * value for name, value in once.items()}) < 1e-5
