"""Regression of hidden patches (CoCoA, card section 2.1) on tiny Qwen2-VL and Qwen2.5-VL models."""

from typing import Any

import pytest
import torch
from tiny_vision import IDS, vision_model
from torch import Generator, Tensor

from lit_core.backbones import Lora, add_adapter, load_backbone
from lit_core.errors import InputError
from lit_embed.functional.masks import bidirectional
from lit_embed.functional.reconstruction import hide_patches, masked_patch_loss, place_hidden
from lit_embed.modules.bridge_attention import text_decoder
from lit_embed.modules.image_reconstruction import ImageReconstruction, pixels_per_token, position_embeddings

NAMES = ("qwen2_vl", "qwen2_5_vl")
GRIDS = torch.tensor([[1, 4, 4], [1, 2, 4]])  # 4 and 2 merged tokens
IMAGE = IDS["image_token_id"]
ROWS = [[94, IMAGE, IMAGE, IMAGE, IMAGE, 95, 5, 6, 7], [0, 0, 94, IMAGE, IMAGE, 95, 8, 9, 0]]
VALID = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 0]]).bool()
POSITIONS = torch.tensor(  # frames, rows, columns; text goes on behind the largest
    [
        [[0, 1, 1, 1, 1, 3, 4, 5, 6], [0, 0, 0, 1, 1, 3, 4, 5, 0]],
        [[0, 1, 1, 2, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 3, 4, 5, 0]],
        [[0, 1, 2, 1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 2, 3, 4, 5, 0]],
    ]
)


def _pixels() -> Tensor:
    return torch.randn(24, 1176, generator=Generator().manual_seed(0))


def _embeds(model: Any, pixel_values: Tensor) -> Tensor:
    ids = torch.tensor(ROWS)
    features = torch.cat(model.model.get_image_features(pixel_values, GRIDS).pooler_output)
    embeds = model.get_input_embeddings()(ids)
    return embeds.masked_scatter((ids == IMAGE)[..., None], features.to(embeds.dtype))


def _states(model: Any, pixel_values: Tensor) -> Tensor:
    embeds = _embeds(model, pixel_values)
    mask = bidirectional(VALID, dtype=embeds.dtype)
    decoder = text_decoder(model)
    output = decoder(inputs_embeds=embeds, attention_mask=mask, position_ids=POSITIONS, use_cache=False)
    return output.last_hidden_state


def _predict(model: Any, head: ImageReconstruction, states: Tensor, hidden: Tensor) -> Tensor:
    angles = position_embeddings(model, states, POSITIONS)
    return head(states, bidirectional(VALID, dtype=states.dtype), angles, hidden)


@pytest.mark.parametrize("name", NAMES)
def test_it_is_the_middle_layer_and_a_linear_map(name: str) -> None:
    """Row by row, without padding, through the model's own layer in float64."""
    model = vision_model(name).double()
    head = ImageReconstruction(model).double()
    decoder = text_decoder(model)
    states = torch.randn(2, 9, 64, generator=Generator().manual_seed(1), dtype=torch.float64)
    hidden = torch.tensor([[0, 1, 0, 1, 1, 0, 0, 0, 0], [0, 0, 0, 0, 1, 0, 0, 0, 0]]).bool()
    found = _predict(model, head, states, hidden)
    assert found.shape == (4, 4704)
    expected = []
    for row in range(2):
        tokens = VALID[row].nonzero().squeeze(1)
        alone = states[row : row + 1, tokens]
        angles = decoder.rotary_emb(alone, POSITIONS[:, row : row + 1, tokens])
        everything = torch.zeros(1, 1, len(tokens), len(tokens), dtype=torch.float64)
        output = decoder.layers[1](alone, attention_mask=everything, position_embeddings=angles)[0]
        for token in hidden[row, tokens].nonzero().squeeze(1).tolist():
            weight, bias = head.projection.weight, head.projection.bias
            expected.append(weight @ output[token] + bias)
    torch.testing.assert_close(found, torch.stack(expected), rtol=0, atol=1e-10)
    causal = decoder.layers[1](states[:1], position_embeddings=decoder.rotary_emb(states[:1], POSITIONS[:, :1]))
    assert not torch.allclose(causal[0, 1], output[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_step_of_stage_one_reaches_the_whole_model_and_learns(name: str) -> None:
    model = vision_model(name)
    head = ImageReconstruction(model)
    pixels = _pixels()
    noisy, hidden, targets = hide_patches(pixels, GRIDS, 0.5, [1, 2])
    placed = place_hidden(torch.tensor(ROWS) == IMAGE, hidden)
    assert targets.shape == (int(placed.sum()), pixels_per_token(model))
    trained = [*model.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(trained, lr=3e-3)
    losses = []
    for step in range(12):
        optimizer.zero_grad()
        loss = masked_patch_loss(_predict(model, head, _states(model, noisy), placed), targets)
        loss.backward()
        if step == 0:
            untouched = [key for key, p in model.named_parameters() if p.grad is None and "lm_head" not in key]
            assert untouched == []  # vision tower, embeddings, layers
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(1, abs=0.1)  # normalised pixels against a map that gives nearly 0
    assert losses[-1] < 0.7 * losses[0]


def test_hidden_pixels_cannot_be_seen() -> None:
    """What stood in a hidden patch changes neither states nor predictions; what stands elsewhere does."""
    model = vision_model("qwen2_vl")
    head = ImageReconstruction(model)
    pixels = _pixels()
    found = hide_patches(pixels, GRIDS, 0.5, [1, 2])
    placed = place_hidden(torch.tensor(ROWS) == IMAGE, found.hidden)
    rows = found.hidden.repeat_interleave(4)
    predictions = []
    for changed in (torch.zeros_like(rows), rows, ~rows):
        other = torch.where(changed[:, None], -pixels, pixels)
        noisy = hide_patches(other, GRIDS, 0.5, [1, 2]).pixel_values
        predictions.append(_predict(model, head, _states(model, noisy), placed))
    assert torch.equal(predictions[0], predictions[1])
    assert not torch.allclose(predictions[0], predictions[2], atol=1e-6)


def test_sizes_come_from_the_vision_tower() -> None:
    assert pixels_per_token(vision_model("qwen2_vl")) == 4 * 1176
    assert pixels_per_token(vision_model("qwen2_5_vl")) == 4 * 1176
    sizes = {"patch_size": 7, "temporal_patch_size": 1, "in_channels": 1, "spatial_merge_size": 3}
    assert pixels_per_token(vision_model("qwen2_vl", **sizes)) == 9 * 49
    with pytest.raises(InputError, match="needs a vision-language model, got one of type qwen3"):
        ImageReconstruction(load_backbone("tiny-qwen3", "causal_lm"))


def test_the_head_is_a_copy_with_seeded_weights() -> None:
    model = vision_model("qwen2_vl")
    state = torch.random.get_rng_state()
    heads = [ImageReconstruction(model, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(torch.random.get_rng_state(), state)  # global draws go on as if there were no head
    assert torch.equal(heads[0].projection.weight, heads[1].projection.weight)
    assert not torch.equal(heads[0].projection.weight, heads[2].projection.weight)
    assert float(heads[0].projection.weight.detach().std()) == pytest.approx(0.02, abs=1e-4)
    assert not heads[0].projection.bias.any()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.no_grad():
        for parameter in heads[0].parameters():
            parameter.add_(1)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_adapters_stay_out_of_the_copy_and_half_precision_too() -> None:
    model = vision_model("qwen2_vl")
    own = text_decoder(model).layers[1].state_dict()
    own = {key: value.bfloat16().float() for key, value in own.items()}
    adapted = add_adapter(model.bfloat16(), Lora(r=2, targets=["q_proj", "down_proj"], dora=True), "causal_lm")
    head = ImageReconstruction(adapted)
    assert head.layer.state_dict().keys() == own.keys()
    assert all(torch.equal(value, own[key]) for key, value in head.layer.state_dict().items())
    assert all(parameter.requires_grad and parameter.dtype == torch.float32 for parameter in head.parameters())
    states = torch.randn(2, 9, 64, generator=Generator().manual_seed(1)).bfloat16()
    hidden = torch.zeros(2, 9, dtype=torch.bool)
    assert _predict(adapted, head, states, hidden).shape == (0, 4704)  # a batch without hidden patches
    hidden[0, 1] = True
    assert _predict(adapted, head, states, hidden).dtype == torch.float32


def test_a_quantised_layer_is_refused() -> None:
    model = vision_model("qwen2_vl")
    layer = text_decoder(model).layers[1]
    layer.mlp.up_proj.weight = torch.nn.Parameter(torch.zeros(64 * 96 // 2, 1, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(InputError, match="must not be quantised"):
        ImageReconstruction(model)
