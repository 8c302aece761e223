"""CoCoA's losses against rows taken one by one, its stages in fits, its mistakes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_core.callbacks.step_seed import StepSeed
from lit_core.errors import InputError
from lit_core.lm_head import IGNORE_INDEX
from lit_core.optim import Schedule
from lit_embed.data.multimodal_datamodule import _MAKE, MultimodalDataModule
from lit_embed.data.scenes import SceneConfig
from lit_embed.functional import masks
from lit_embed.functional.losses import per_query_info_nce
from lit_embed.methods.cocoa import CoCoA, small_gap
from lit_embed.modules.content import bridge_loss, caption_loss, end_shift, reconstruct, warmup_losses
from lit_embed.modules.multimodal_batches import ReconstructionBatch
from lit_embed.modules.multimodal_tokenization import MultimodalConfig
from lit_embed.multimodal import ContrastiveRow

SCENES = SceneConfig(train_scenes=24, eval_scenes=4, candidates=4, family=2)
ENCODER = MultimodalConfig(max_tokens=64, image_size=56, chunk_tokens=150)
BACKBONES = ("tiny-qwen2-vl", "tiny-qwen2_5-vl")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


def build(stage: Any, **settings: Any) -> CoCoA:
    common: dict[str, Any] = {
        "backbone": BACKBONES[0],
        "encoder": ENCODER,
        "schedule": Schedule("constant"),
        "optimizer": sgd,
        "temperature": 0.1,
    }
    module = CoCoA(stage=stage, **{**common, **settings})
    module.configure_model()
    return module.eval()


def data(module: CoCoA, **settings: Any) -> MultimodalDataModule:
    stage: Any = "warmup" if module.stage == "captioning" else module.stage
    return MultimodalDataModule(
        stage=stage, scenes=SCENES, **{"batch_size": 6, "eval_batch_size": 16, "val_rows": 6, **settings}
    )


def batch_of(module: CoCoA, count: int = 6, train: bool = True) -> Any:
    source = data(module)
    source.setup("fit")
    rows = next(iter(source.train_rows.values()))[:count]
    stage: Any = source.stage
    return module.multimodal_collator(stage, train)([_MAKE[stage](row, 100 + n) for n, row in enumerate(rows)])


def by_row(module: CoCoA, batch: ReconstructionBatch, mask_of: Any) -> list[tuple[Tensor, Tensor]]:
    """Log-probabilities ``(L, V)`` of each row alone, and its labels."""
    encoder, found = module.encoder, []
    for row, labels in enumerate(batch.labels.split(batch.tokens.lengths)):
        padded = batch.tokens.pad([row], encoder.tokenizer.pad_token_id)
        states = encoder.states(padded, mask_of(padded))
        found.append(((states[0] @ encoder.head_weight.T).log_softmax(-1), labels))
    return found


def mean_loss(rows: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Each label from the state before it, one by one."""
    terms = [-table[i - 1, label] for table, labels in rows for i, label in enumerate(labels.tolist())
             if label != IGNORE_INDEX and i > 0]  # fmt: skip
    return torch.stack(terms).mean()


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("bridge", ["collaborative", "strict", "one_way"])
def test_the_bridge_loss_is_that_of_the_rows(backbone: str, bridge: Any) -> None:
    module = build("reconstruction", backbone=backbone, bridge=bridge)
    batch = batch_of(module)
    kind = getattr(masks, bridge)
    expected = mean_loss(by_row(module, batch, lambda p: kind(p.mask.bool(), p.ends)))
    forms = ("auto", "dense", "split") + (() if bridge == "collaborative" else ("two_pass",))
    gradients = {}
    for form in forms:
        module.zero_grad()
        loss = bridge_loss(module.encoder, batch, bridge, form)  # type: ignore[arg-type]
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
        loss.backward()  # type: ignore[no-untyped-call]
        gradients[form] = torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])
    for form in forms:
        torch.testing.assert_close(gradients[form], gradients["dense"], atol=1e-5, rtol=1e-3)
    hidden = (batch.labels != IGNORE_INDEX).float().mean()
    assert 0.05 < float(hidden) < 0.6


@torch.no_grad()
def test_targets_are_told_through_the_bridge_alone() -> None:
    """Another picture moves what is told only by way of the bridge token; under strict the target does not move it."""
    module = build("reconstruction", bridge="strict")
    batch = batch_of(module, train=False)
    assert batch.shuffled is not None
    assert batch.shuffled.count == batch.count
    wanted = [labels[labels != IGNORE_INDEX] for labels in (batch.labels, batch.shuffled.labels)]
    assert torch.equal(*wanted)
    assert float(bridge_loss(module.encoder, batch)) != float(bridge_loss(module.encoder, batch.shuffled))
    assert float(end_shift(module.encoder, batch, "strict", "auto")) < 1e-6
    assert float(end_shift(module.encoder, batch, "one_way", "auto")) < 1e-6
    assert float(end_shift(module.encoder, batch, "collaborative", "auto")) > 1e-5
    told = reconstruct(module.encoder, batch, "strict", "auto")
    rows = by_row(module, batch, lambda p: masks.strict(p.mask.bool(), p.ends))
    for found, (table, labels) in zip(told.split(batch.tokens.lengths), rows, strict=True):
        for place, label in enumerate(labels.tolist()):
            assert int(found[place]) == (IGNORE_INDEX if label == IGNORE_INDEX else int(table[place - 1].argmax()))


@torch.no_grad()
def test_validation_batches_without_another_query_take_as_many_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharded ranks gather weights in every pass, so that one that had fewer would leave the others waiting."""
    module = build("reconstruction")
    batch, passes = batch_of(module, train=False), list[int]()
    states = module.encoder.states
    monkeypatch.setattr(module.encoder, "states", lambda *a, **kw: (passes.append(1), states(*a, **kw))[1])
    values = module._bridge_values(batch)
    assert float(values["val/bridge_gap"]) != 0
    count = len(passes)
    values = module._bridge_values(replace(batch, shuffled=None))
    assert float(values["val/bridge_gap"]) == 0
    assert len(passes) == 2 * count


@pytest.mark.parametrize("backbone", BACKBONES)
def test_the_warm_up_losses_are_those_of_the_rows(backbone: str) -> None:
    module = build("warmup", backbone=backbone, text_rate=0.4)
    batch = batch_of(module)
    text, image = warmup_losses(module.encoder, module.image_head, batch)
    rows = by_row(module, batch, lambda p: masks.bidirectional(p.mask.bool()))
    torch.testing.assert_close(text, mean_loss(rows), atol=1e-5, rtol=1e-5)
    assert batch.images is not None
    clean = build("warmup", backbone=backbone, image_rate=0.0)
    pixels = batch_of(clean).tokens.pixels
    assert pixels is not None
    patch = batch.images.hidden.repeat_interleave(4)
    noisy = batch.tokens.pixels
    assert noisy is not None
    assert torch.equal(noisy[~patch], pixels[~patch])
    assert not torch.isclose(noisy[patch], pixels[patch]).all(1).any()
    assert torch.equal(batch.images.targets, pixels[patch].reshape(len(batch.images.targets), -1))
    assert 0.2 < float(image.detach()) < 5
    (text + image).backward()  # type: ignore[no-untyped-call]
    assert module.image_head.projection.weight.grad is not None


def test_captions_are_predicted_token_by_token() -> None:
    module = build("captioning")
    batch = batch_of(module)
    rows = by_row(module, batch, lambda p: None)
    torch.testing.assert_close(caption_loss(module.encoder, batch), mean_loss(rows), atol=1e-5, rtol=1e-5)
    ends = torch.tensor(batch.tokens.lengths).cumsum(0) - 1
    assert (batch.labels[ends] == module.encoder.tokenizer.eos_token_id).all()


def test_without_a_mask_token_a_row_that_no_token_has_stands_for_hidden_ones() -> None:
    """As Qwen2-VL's own tokenizer is: 151,657 tokens, 151,936 rows."""
    module = build("reconstruction", backbone=BACKBONES[0])
    assert (batch_of(module).tokens.ids == module.encoder.tokenizer.mask_token_id).any()
    module.encoder.tokenizer.mask_token = None
    unused = len(module.encoder.tokenizer)
    module.encoder.model.resize_token_embeddings(unused + 8)  # type: ignore[operator]
    batch = batch_of(module)
    assert torch.equal(batch.tokens.ids == unused, batch.labels != IGNORE_INDEX)
    assert bridge_loss(module.encoder, batch).isfinite()
    module.mask_token = "_"
    assert [module._mask_id()] == module.encoder.tokenizer("_", add_special_tokens=False)["input_ids"]


def test_what_a_row_loses_depends_on_its_seed_alone() -> None:
    module = build("reconstruction")
    whole, part = batch_of(module, 6), batch_of(module, 3)
    first = sum(part.tokens.lengths)
    assert torch.equal(whole.labels[:first], part.labels)
    assert torch.equal(whole.tokens.ids[:first], part.tokens.ids)


def test_long_rows_keep_image_and_bridge() -> None:
    narrow = MultimodalConfig(max_tokens=24, image_size=56)
    module = build("reconstruction", encoder=narrow)
    batch = batch_of(module)
    bridge = module.encoder.tokenizer.eos_token_id
    for ids, end, start in zip(batch.tokens.ids.split(batch.tokens.lengths), batch.tokens.ends,
                               batch.tokens.image_starts, strict=True):  # fmt: skip
        assert len(ids) <= 24
        assert int(ids[end]) == bridge
        assert int((ids == module.encoder.image_token).sum()) == (4 if start else 0)
        assert len(ids) > end + 1  # something of the target is left


class SaveAt(Callback):
    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(module: CoCoA, folder: Path, steps: int, *callbacks: Callback, ckpt: Path | None = None) -> dict[str, Tensor]:
    trainer = Trainer(
        accelerator="cpu", devices=1, max_steps=steps, logger=False, enable_checkpointing=False,
        default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, use_distributed_sampler=False, num_sanity_val_steps=0,
        callbacks=[StepSeed(0), *callbacks], val_check_interval=2, check_val_every_n_epoch=None,
    )  # fmt: skip
    trainer.fit(module, datamodule=data(module), ckpt_path=ckpt, weights_only=True)
    return {name: value.detach().clone() for name, value in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["captioning", "warmup", "reconstruction", "contrastive"])
def test_a_resumed_fit_ends_with_the_same_weights(stage: str, tmp_path: Path) -> None:
    half = tmp_path / "half.ckpt"
    whole = fit(build(stage), tmp_path, 3, SaveAt(half, 2))
    resumed = fit(build(stage), tmp_path, 3, ckpt=half)
    for name, value in whole.items():
        assert torch.equal(resumed[name], value), name


@pytest.mark.slow
def test_gradcache_takes_the_same_steps(tmp_path: Path) -> None:
    plain = fit(build("contrastive"), tmp_path, 2)
    cached = fit(build("contrastive", grad_cache=True), tmp_path, 2)
    for name, value in plain.items():
        torch.testing.assert_close(cached[name], value, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("temperature", "losses", "mean"),
    [(1.0, [1.296023, 0.712067, 0.982352], 0.996814), (0.02, [18.000335, 0.0, 10.000045], 9.333460)],
)
def test_the_contrastive_loss_card_c6(temperature: float, losses: list[float], mean: float) -> None:
    queries = torch.tensor([[3.0, 4.0], [0.0, 1.0], [1.0, 0.0]])
    targets = torch.tensor([[1.0, 0.0], [0.0, 2.0], [4.0, 3.0]])
    assert per_query_info_nce(queries, targets, temperature).tolist() == pytest.approx(losses, abs=5e-6)
    batch = batch_of(build("contrastive"), 3)
    batch = replace(
        batch, queries=3, targets=torch.arange(3), passage_keys=torch.arange(3), positive_keys=torch.arange(3)[:, None],
        own=torch.eye(3).bool(), own_only=torch.zeros(3, dtype=torch.bool),
    )  # fmt: skip
    loss = CoCoA(BACKBONES[0], temperature=temperature).loss(torch.cat([queries, targets]), batch)
    assert float(loss) == pytest.approx(mean, abs=5e-6)
    assert CoCoA(BACKBONES[0]).loss.temperature == 0.02


def test_equal_targets_are_no_negatives() -> None:
    module = build("contrastive")
    source = data(module)
    source.setup("fit")
    pairs = source.train_rows["classification"][:6]
    rows = [ContrastiveRow(pair.query, pairs[n % 2].positive, None, "", n) for n, pair in enumerate(pairs)]
    batch = module.multimodal_collator("contrastive", True)(rows)
    distinct = len({pair.positive.key for pair in pairs[:2]})
    assert len(batch.passage_keys) == distinct
    vectors = module.encoder(batch.tokens)
    queries, targets = vectors[:6], vectors[6:]
    scores = queries @ targets.T / 0.1
    torch.testing.assert_close(module.loss(vectors, batch), F.cross_entropy(scores, batch.targets))


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"text_rate": 0.0}, "text_rate': is a share, above 0 to 1, got 0.0"),
        ({"target_rate": 1.5}, "target_rate"),
        ({"image_weight": -1.0}, "image_weight': must be at least 0"),
        ({"temperature": 0.0}, "temperature': must be above 0"),
        ({"form": "two_pass"}, "form': form two_pass needs bridge strict or one_way"),
        ({"stage": "contrastive", "backbone": "tiny-qwen3"}, "images need one of qwen2_vl"),
        ({"encoder": MultimodalConfig(bridge="<|endoftext|>")}, "must differ from the padding token"),
    ],
)
def test_mistakes(settings: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=None) as error:
        build(settings.pop("stage", "reconstruction"), **settings)
    assert told in str(error.value)


def test_a_bridge_that_tells_nothing_is_named() -> None:
    assert "bridge_gap is 0.010" in small_gap(0.01)
    module = build("reconstruction")
    with pytest.raises(InputError, match="must be reconstruction for the model's stage reconstruction"):
        module.multimodal_collator("warmup", True)
