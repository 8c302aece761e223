"""States under a bridge in every form against single rows under a mask written out, in float64 (CoCoA, card 2.4)."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tiny_vision import vision_model
from torch import Generator, Tensor

from lit_core.backbones import BackboneConfig, Lora, load_backbone
from lit_core.errors import InputError
from lit_embed.functional.masks import Bridge
from lit_embed.functional.reconstruction import label_states, mask_tokens
from lit_embed.modules.bridge_attention import pairs_per_token, split_saves, text_decoder, use_bridge_attention
from lit_embed.modules.bridge_decoder import (
    BridgeForm,
    DecoderRows,
    bridge_states,
    check_form,
    decode_targets,
    encode_contexts,
)

MODELS = ("tiny-qwen3", "tiny-llama", "qwen2_vl", "qwen2_5_vl")
BRIDGES: tuple[Bridge, ...] = ("collaborative", "strict", "one_way")
FORMS: dict[Bridge, tuple[BridgeForm, ...]] = {
    "collaborative": ("dense", "split", "auto"),
    "strict": ("dense", "split", "two_pass", "auto"),
    "one_way": ("dense", "split", "two_pass", "auto"),
}
SEES = {  # the table of card section 2.2
    "collaborative": {"A": "AE", "E": "AEB", "B": "EB"},
    "strict": {"A": "AE", "E": "AE", "B": "EB"},
    "one_way": {"A": "A", "E": "AE", "B": "EB"},
}
PADDED = ("-AAAEBBBB-", "-----EBB--", "AAAAAAE---", "--AEB-----")
IMAGE = torch.tensor([[0, 1, 1, 1, 1, 3, 4, 5], [0, 1, 1, 2, 2, 3, 4, 5], [0, 1, 2, 1, 2, 3, 4, 5]])  # card, M-RoPE


@cache
def _model(name: str, attention: Any = "bridge") -> Any:
    """A model of which no test changes more than the gradients; eager attention has its softmax in float32."""
    used = "eager" if attention == "eager" else "sdpa"
    tiny = name.startswith("tiny")
    model = load_backbone(name, "causal_lm", BackboneConfig(attention=used)) if tiny else vision_model(name, used)
    if attention == "bridge":
        use_bridge_attention(model)
    return model.double().train()


def _rows(name: str, rows: tuple[str, ...] = PADDED, seed: int = 0) -> tuple[DecoderRows, Tensor]:
    """Random ids; for vision models embeddings, with positions of an image of 2 x 2 merged tokens at the start."""
    valid = torch.tensor([[place != "-" for place in row] for row in rows])
    ids = torch.randint(1, 30, valid.shape, generator=Generator().manual_seed(seed))
    end_index = torch.tensor([row.index("E") for row in rows])
    if name.startswith("tiny"):
        return DecoderRows(valid, ids), end_index
    place = (valid.cumsum(1) - 1).clamp(min=0)
    positions = torch.stack([torch.where(place < 8, axis[place.clamp(max=7)], place - 2) for axis in IMAGE])
    embeds = text_decoder(_model(name)).embed_tokens(ids)
    return DecoderRows(valid, inputs_embeds=embeds, position_ids=positions), end_index


def _plain(name: str, bridge: Bridge, batch: DecoderRows, rows: tuple[str, ...]) -> Tensor:
    """One row at a time, without padding, under the table as a mask: states of all tokens, row by row."""
    decoder, found = text_decoder(_model(name, "sdpa")), []
    for number, row in enumerate(rows):
        columns = [column for column, place in enumerate(row) if place != "-"]
        table = torch.tensor([[row[j] in SEES[bridge][row[i]] for j in columns] for i in columns])
        mask = torch.zeros(table.shape, dtype=torch.float64).masked_fill(~table, -1e300)[None, None]
        inputs = {key: value[..., number : number + 1, :][..., columns] for key, value in batch.inputs.items()}
        if "inputs_embeds" in inputs:
            inputs["inputs_embeds"] = batch.inputs["inputs_embeds"][number : number + 1, columns]
        found.append(decoder(**inputs, attention_mask=mask, use_cache=False).last_hidden_state[0])
    return torch.cat(found)


def _gradients(model: Any, states: Tensor) -> dict[str, Tensor]:
    """Of a random projection of the states."""
    model.zero_grad()
    weights = torch.randn(states.shape, generator=Generator().manual_seed(5), dtype=torch.float64)
    (states * weights).sum().backward()
    return {key: value.grad.clone() for key, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("bridge", BRIDGES)
@pytest.mark.parametrize("name", MODELS)
def test_every_form_equals_plain_attention_in_states_and_gradients(name: str, bridge: Bridge) -> None:
    batch, _ = _rows(name)
    expected = _plain(name, bridge, batch, PADDED)
    gradients = _gradients(_model(name, "sdpa"), expected)
    for form in FORMS[bridge]:
        model = _model(name)
        batch, end_index = _rows(name)  # embeddings with a graph of their own
        states = bridge_states(model, batch, end_index, bridge, form)[batch.valid]
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-10)
        found = _gradients(model, states)
        assert found.keys() >= {key for key in gradients if "embed_tokens" not in key}
        for key, value in found.items():
            if key in gradients:
                torch.testing.assert_close(value, gradients[key], rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "rows", [("AAEBBB-", "AAEBBB-"), ("AAEB", "-AEB"), ("AAEB", "AAE-"), ("AAE", "AE-"), ("EB", "E-")]
)
@pytest.mark.parametrize("bridge", BRIDGES)
def test_batches_with_little_padding_and_without_a_block(bridge: Bridge, rows: tuple[str, ...]) -> None:
    """Where a slice has no padding there is no mask, and an empty block is no call."""
    batch, end_index = _rows("tiny-qwen3", rows)
    expected = _plain("tiny-qwen3", bridge, batch, rows)
    for form in FORMS[bridge]:
        states = bridge_states(_model("tiny-qwen3"), batch, end_index, bridge, form)
        torch.testing.assert_close(states[batch.valid], expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("bridge", ["strict", "one_way"])
def test_two_passes_and_dense_run_on_models_as_they_are(bridge: Bridge) -> None:
    batch, end_index = _rows("tiny-llama")
    expected = _plain("tiny-llama", bridge, batch, PADDED)
    for form in ("two_pass", "dense", "auto"):
        states = bridge_states(_model("tiny-llama", "eager"), batch, end_index, bridge, form)  # type: ignore[arg-type]
        torch.testing.assert_close(states[batch.valid], expected, rtol=0, atol=2e-6)
        states = bridge_states(_model("tiny-llama", "sdpa"), batch, end_index, bridge, form)  # type: ignore[arg-type]
        torch.testing.assert_close(states[batch.valid], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny-qwen3", "qwen2_vl"])
def test_several_targets_share_a_first_pass(name: str) -> None:
    """Two contexts, four targets: as if each pair were a row of its own."""
    contexts, targets = ("AAAAE-", "-AE---"), ("BBB", "-B-", "BB-", "BBB")
    owner = torch.tensor([0, 1, 1, 0])
    model = _model(name)
    first, _ = _rows(name, contexts)
    ids = torch.randint(1, 30, (4, 3), generator=Generator().manual_seed(9))
    second = DecoderRows(torch.tensor([[place == "B" for place in row] for row in targets]), ids)
    if name != "tiny-qwen3":
        second = replace(second, input_ids=None, inputs_embeds=text_decoder(model).embed_tokens(ids))
    for bridge in BRIDGES[1:]:
        prefix = encode_contexts(model, first, bridge)
        assert prefix.end_states.shape[0] == 2
        states = decode_targets(model, second, prefix.take(owner))
        for row in range(4):
            context = first.valid[owner[row]]
            one = {
                key: torch.cat([_row(a, int(owner[row]), context), _row(b, row, second.valid[row])], dim=1)
                for (key, a), b in zip(_tokens(first).items(), _tokens(second).values(), strict=True)
            }
            length = next(iter(one.values())).shape[1]
            count = int(context.sum())
            start = first.positions[..., owner[row], :][..., context]
            more = start[..., -1:] + 1 + torch.arange(length - count)
            positions = torch.cat([start, more], dim=-1)[..., None, :]
            whole = DecoderRows(torch.ones(1, length, dtype=torch.bool), position_ids=positions, **one)
            expected = bridge_states(model, whole, torch.tensor([count - 1]), bridge, "dense")[0]
            torch.testing.assert_close(states[row][second.valid[row]], expected[count:], rtol=0, atol=1e-10)
            torch.testing.assert_close(prefix.end_states[owner[row]], expected[count - 1], rtol=0, atol=1e-10)


def _tokens(rows: DecoderRows) -> dict[str, Tensor]:
    return {key: value for key, value in rows.inputs.items() if key != "position_ids"}


def _row(values: Tensor, row: int, valid: Tensor) -> Tensor:
    return values[row, valid][None]


@torch.no_grad()
def test_one_way_needs_a_first_pass_in_which_a_is_blind_to_e() -> None:
    """The bidirectional first pass is exact for strict alone: with it, A reads E and E reads A in the next layer."""
    batch, end_index = _rows("tiny-qwen3", ("AAAEBBB", "AAAEBBB"))
    model = _model("tiny-qwen3")
    contexts, targets = batch.part(slice(0, 4)), batch.part(slice(4, 7))
    for bridge in BRIDGES[1:]:
        expected = bridge_states(model, batch, end_index, bridge, "dense")[:, 4:]
        for first in BRIDGES[1:]:
            states = decode_targets(model, targets, encode_contexts(model, contexts, first))
            difference = float((states - expected).abs().max())
            assert (difference < 1e-10) == (first == bridge), (bridge, first, difference)


@torch.no_grad()
@pytest.mark.parametrize("bridge", BRIDGES)
def test_who_depends_on_whom(bridge: Bridge) -> None:
    """Other targets move A and E under collaborative alone; other contexts reach B through E in any case."""
    model = _model("tiny-qwen3")
    batch, end_index = _rows("tiny-qwen3", ("AAAEBBB",))
    ids = batch.inputs["input_ids"]
    base = bridge_states(model, batch, end_index, bridge, "split")[0]
    other_target = DecoderRows(batch.valid, torch.cat([ids[:, :4], ids[:, 4:] + 1], dim=1))
    moved = (bridge_states(model, other_target, end_index, bridge, "split")[0] - base).abs().amax(1)
    assert all((float(change) > 1e-4) == (bridge == "collaborative") for change in moved[:4])
    assert all(float(change) == 0 for change in moved[:4]) == (bridge != "collaborative")
    other_context = DecoderRows(batch.valid, torch.cat([ids[:, :3] + 1, ids[:, 3:]], dim=1))
    assert bool(
        ((bridge_states(model, other_context, end_index, bridge, "split")[0] - base).abs().amax(1) > 1e-4).all()
    )


def test_padding_and_neighbours_change_nothing() -> None:
    model = _model("tiny-llama")
    for bridge in BRIDGES:
        batch, end_index = _rows("tiny-llama")
        for form in FORMS[bridge]:
            together = bridge_states(model, batch, end_index, bridge, form)
            for number, row in enumerate(PADDED):
                columns = [column for column, place in enumerate(row) if place != "-"]
                alone = DecoderRows(
                    torch.ones(1, len(columns), dtype=torch.bool), batch.inputs["input_ids"][[number]][:, columns]
                )
                end = torch.tensor([columns.index(int(end_index[number]))])
                expected = bridge_states(model, alone, end, bridge, form)[0]
                torch.testing.assert_close(together[number, columns], expected, rtol=0, atol=1e-10)


def test_losses_of_the_forms_agree() -> None:
    """MNTP through the bridge: the first target token is predicted from E, wherever the columns are."""
    batch, end_index = _rows("tiny-qwen3")
    ids = batch.inputs["input_ids"]
    masked = batch.valid & (torch.arange(ids.shape[1]) > end_index[:, None])
    corrupted, labels = mask_tokens(ids, masked, 31)
    model = _model("tiny-qwen3")
    losses = []
    for form in FORMS["strict"]:
        states = bridge_states(model, DecoderRows(batch.valid, corrupted), end_index, "strict", form)
        predicting, targets = label_states(states, labels, batch.valid)
        assert targets.tolist() == ids[masked].tolist()
        torch.testing.assert_close(predicting[0], states[0, 4], rtol=0, atol=0)  # row 0: E stands at 4
        losses.append(F.cross_entropy(model.lm_head(predicting), targets))
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=0, atol=1e-10)


def test_checkpointing_keeps_the_gradients_of_split_and_is_refused_by_two_pass() -> None:
    batch, end_index = _rows("tiny-qwen3")
    gradients = []
    for checkpointing in (False, True):
        config = BackboneConfig(gradient_checkpointing=checkpointing)
        model: Any = load_backbone("tiny-qwen3", "causal_lm", config).double().train()
        use_bridge_attention(model)
        gradients.append(_gradients(model, bridge_states(model, batch, end_index, "strict", "split")[batch.valid]))
    assert gradients[0].keys() == gradients[1].keys()
    for key, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], value, rtol=1e-9, atol=1e-12)
    with pytest.raises(InputError, match="form two_pass needs the key-value cache"):
        bridge_states(model, batch, end_index, "strict", "two_pass")
    batch, _ = _rows("tiny-qwen3", ("AAEBB", "AAEBB"))
    prefix = encode_contexts(model.eval(), batch.part(slice(0, 3)), "strict")
    with pytest.raises(InputError, match="form two_pass needs the key-value cache"):
        decode_targets(model.train(), batch.part(slice(3, None)), prefix)


def test_adapters_take_part() -> None:
    model: Any = load_backbone("tiny-qwen3", "causal_lm", lora=Lora(r=2, dropout=0.0))
    use_bridge_attention(model)
    batch, end_index = _rows("tiny-qwen3")
    bridge_states(model, batch, end_index, form="split")[batch.valid].sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad and "lora_B" in name}
    layers = {name: value for name, value in gradients.items() if "lm_head" not in name}
    assert layers
    assert all(value is not None and value.abs().sum() > 0 for value in layers.values())


def test_a_vision_tower_keeps_its_attention() -> None:
    model = _model("qwen2_vl")
    assert model.config.text_config._attn_implementation == "bridge_split"
    assert model.config.vision_config._attn_implementation == "sdpa"


def test_the_cost_decides() -> None:
    """Without padding split always computes fewer pairs; columns that it adds cost more than it saves."""
    assert split_saves("collaborative", 256, 64, 321)
    assert split_saves("collaborative", 1280, 64, 1345)
    assert split_saves("collaborative", 256, 256, 513, token_pairs=500)
    assert not split_saves("collaborative", 256, 256, 400, token_pairs=500)  # long A with short B and the reverse
    assert split_saves("strict", 256, 256, 400)
    decoder = text_decoder(_model("tiny-llama"))
    weights = 2 * 128 * 128 + 2 * 128 * 64 + 3 * 128 * 320 + 2 * 128
    assert pairs_per_token(decoder) == weights / (2 * 4 * 32)


def test_what_cannot_be_is_refused() -> None:
    batch, end_index = _rows("tiny-llama")
    with pytest.raises(InputError, match="two_pass needs bridge strict or one_way"):
        bridge_states(_model("tiny-llama"), batch, end_index, "collaborative", "two_pass")
    with pytest.raises(InputError, match=r"needs use_bridge_attention\(model\), got plain eager attention"):
        check_form(_model("tiny-llama", "eager"), "strict", "split")
    flex = load_backbone("tiny-llama", "causal_lm")
    flex.config._attn_implementation = "flex_attention"  # type: ignore[union-attr]
    with pytest.raises(InputError, match="need sdpa or eager attention, got flex_attention"):
        check_form(flex, "strict", "dense")
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        DecoderRows(batch.valid)
