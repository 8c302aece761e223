"""Adapters merged without their base are the merge of the models that they are folded into."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_core.errors import InputError
from lit_core.merging import merge, merge_adapters
from lit_core.merging.adapter_folder import ADAPTER, CONFIG, PREFIX, Factors
from lit_core.merging.adapters import gram_of_updates, stacked, truncated
from lit_core.merging.model_folder import WEIGHTS

NAME = f"{PREFIX}h.0.q"


def adapter(folder: Path, updates: Mapping[str, tuple[Any, Any]], alpha: float | None = None, **config: Any) -> Path:
    """A folder with factors ``(A, B)`` by module; scale 1 unless ``alpha`` says otherwise."""
    folder.mkdir()
    tensors = {f"{name}.lora_{key}.weight": torch.as_tensor(value, dtype=torch.float32).contiguous()
               for name, pair in updates.items() for key, value in zip("AB", pair, strict=True)}  # fmt: skip
    save_file(tensors, folder / ADAPTER)
    rank = len(next(iter(tensors.values())))
    written = {"peft_type": "LORA", "r": rank, "lora_alpha": rank if alpha is None else alpha, "target_modules": ["q"],
               "base_model_name_or_path": "some/base", "bias": "none", "init_lora_weights": True}  # fmt: skip
    (folder / CONFIG).write_text(json.dumps({**written, **config}))
    return folder


def update(folder: Path, module: str = NAME) -> Tensor:
    tensors, config = load_file(folder / ADAPTER), json.loads((folder / CONFIG).read_text())
    assert (config["lora_alpha"], config["use_rslora"]) == (config["r"], False)
    return tensors[f"{module}.lora_B.weight"] @ tensors[f"{module}.lora_A.weight"]


def test_numbers_worked_out_by_hand(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", {NAME: ([[1, 0]], [[1], [0]])})
    two = adapter(tmp_path / "two", {NAME: ([[0, 1]], [[0], [1]])})
    told = merge_adapters([one, two], tmp_path / "cat")
    assert torch.equal(update(tmp_path / "cat"), torch.diag(torch.tensor([0.5, 0.5])))  # no cross terms
    assert (told["rank"], told["truncation"]) == (2, {})
    told = merge_adapters([one, two], tmp_path / "svd", rank=1)
    assert told["truncation"] == {NAME: pytest.approx(0.5)}
    assert float((update(tmp_path / "svd") - torch.diag(torch.tensor([0.5, 0.5]))).norm()) == pytest.approx(0.5)
    assert json.loads((tmp_path / "svd" / "merge.json").read_text()) == told
    merge_adapters([one, two], tmp_path / "sum", "task_arithmetic", [2, 3])
    assert torch.equal(update(tmp_path / "sum"), torch.diag(torch.tensor([2.0, 3.0])))


def test_ranks_scales_and_modules_may_differ(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    other = f"{PREFIX}h.1.q"
    first = {NAME: (torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator)),
             other: (torch.randn(3, 6, generator=generator), torch.randn(5, 3, generator=generator))}  # fmt: skip
    second = {NAME: (torch.randn(4, 6, generator=generator), torch.randn(5, 4, generator=generator))}
    folders = [
        adapter(tmp_path / "one", first, 6, alpha_pattern={"h.1.q": 12, "q": 99}, target_modules=["h.0.q", "q"]),
        adapter(tmp_path / "two", second, 10, use_rslora=True, rank_pattern={"q": 4}, r=2),
    ]
    assert json.loads((folders[0] / CONFIG).read_text())["lora_alpha"] == 6
    merge_adapters(folders, tmp_path / "out", "task_arithmetic", [0.5, 2])
    product = {name: pair[1] @ pair[0] for name, pair in first.items()}
    expected = 0.5 * 99 / 3 * product[NAME] + 2 * 10 / 2 * (second[NAME][1] @ second[NAME][0])
    torch.testing.assert_close(update(tmp_path / "out"), expected)
    torch.testing.assert_close(update(tmp_path / "out", other), 0.5 * 12 / 3 * product[other])
    config = json.loads((tmp_path / "out" / CONFIG).read_text())
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (7, {}, {})
    assert config["target_modules"] == ["h.0.q", "h.1.q"]  # those of the two are not the same


def test_a_truncation_is_the_nearest_and_tells_its_distance() -> None:
    generator = torch.Generator().manual_seed(0)
    for rows, columns, rank in ((9, 7, 5), (4, 20, 6), (20, 3, 5)):
        a = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
        b = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
        values = torch.linalg.svdvals(b @ a)
        for kept in (1, 2, rank):
            found, distance = truncated(Factors(a, b), kept)
            assert found.a.shape[0] == found.b.shape[1] <= kept
            assert distance == pytest.approx(float(values[kept:].square().sum().sqrt()), abs=1e-12)
            assert float((found.b @ found.a - b @ a).norm()) == pytest.approx(distance, abs=1e-12)


def test_products_of_updates_without_forming_them() -> None:
    generator = torch.Generator().manual_seed(0)
    updates = [Factors(torch.randn(rank, 6, generator=generator, dtype=torch.float64),
                       torch.randn(5, rank, generator=generator, dtype=torch.float64)) for rank in (2, 3)]  # fmt: skip
    rows = torch.stack([(one.b @ one.a).flatten() for one in updates] + [torch.zeros(30, dtype=torch.float64)])
    torch.testing.assert_close(gram_of_updates([*updates, None]), rows @ rows.T)
    joined = stacked([updates[0], None, updates[1]], [2.0, 7.0, -1.0])
    torch.testing.assert_close((joined.b @ joined.a).flatten(), 2 * rows[0] - rows[1])
    base = torch.randn(5, 6, generator=generator, dtype=torch.float64)  # and of the folded models
    cross = torch.stack([(one.b * (base @ one.a.T)).sum() for one in updates])
    folded = torch.stack([(base + one.b @ one.a).flatten() for one in updates])
    gram = base.square().sum() + cross[:, None] + cross[None, :] + gram_of_updates(updates)
    torch.testing.assert_close(gram, folded @ folded.T)


class Mixed(nn.Module):
    """A linear layer, an embedding and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.linear, self.conv = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Conv1d(5, 4, 3)


def plain() -> Any:
    torch.manual_seed(0)
    return Mixed()


def tiny() -> Any:
    from transformers import AutoModelForCausalLM

    from lit_core.presets import preset_config

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(preset_config("nano-qwen3", num_hidden_layers=1))


SETTINGS: dict[Callable[[], Any], list[dict[str, Any]]] = {
    plain: [
        {"r": 3, "lora_alpha": 5, "target_modules": ["linear", "conv", "embed"]},
        {"r": 4, "lora_alpha": 2, "use_rslora": True, "target_modules": ["linear", "embed"]},
        {"r": 2, "lora_alpha": 2, "alpha_pattern": {"linear": 7}, "rank_pattern": {"linear": 1},
         "target_modules": ["linear", "conv"]},
    ],
    tiny: [
        {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
        {"r": 2, "lora_alpha": 3, "use_rslora": True, "target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    ],
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft reads it
@pytest.mark.parametrize("build", [plain, pytest.param(tiny, marks=pytest.mark.slow)])
def test_a_merged_adapter_folds_into_the_merge_of_the_folded_models(tmp_path: Path, build: Callable[[], Any]) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model

    base = build().state_dict()
    folders, folded = [], []
    for number, settings in enumerate(SETTINGS[build]):
        model = get_peft_model(build(), LoraConfig(**settings))
        for key, parameter in model.named_parameters():
            if "lora_" in key:
                nn.init.normal_(parameter, std=0.2)
        folders.append(tmp_path / f"m{number}")
        model.save_pretrained(str(folders[-1]), save_embedding_layers=False)
        folded.append(model.merge_and_unload().state_dict())
    count = len(folders)
    for method, weights, options in (
        ("linear", [1.0, 2.0, 0.5][:count], {}),
        ("task_arithmetic", [1.0, -0.4, 0.5][:count], {"lam": 0.7}),
        ("multislerp", None, {"tangent": "log"}),
        ("slerp", None, {}),
        ("model_stock", None, {}),
    ):
        out = tmp_path / method
        told = merge_adapters(folders, out, method, weights, base="some/base", **options)
        assert told["rank"] == {plain: 3 + 4 + 1, tiny: 4 + 2}[build]
        expected = merge(folded, method, weights, base, **options)
        found = PeftModel.from_pretrained(build(), str(out)).merge_and_unload().state_dict()
        torch.testing.assert_close(dict(found), expected, rtol=1e-5, atol=2e-6)
        moved = max(float((expected[key] - base[key]).abs().max()) for key in base)
        assert moved > 0.01  # Model Stock stays near the base


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"peft_type": "IA3"}, "field 'peft_type': only LORA can be merged, got IA3"),
        ({"use_dora": True}, "field 'use_dora': such an adapter is no product of two factors"),
        ({"modules_to_save": ["head"]}, "field 'modules_to_save'"),
        ({"bias": "all"}, "field 'bias': an adapter with biases"),
        ({"init_lora_weights": "pissa"}, "field 'init_lora_weights': 'pissa' changed the base"),
        ({"base_model_name_or_path": "other"}, "is for other, but .*one for some/base; name the base"),
        ({"fan_in_fan_out": True}, "field 'fan_in_fan_out': is not as in"),
    ],
)
def test_adapters_that_cannot_be_merged(tmp_path: Path, config: dict[str, Any], told: str) -> None:
    one = adapter(tmp_path / "one", {NAME: ([[1, 0]], [[1], [0]])})
    two = adapter(tmp_path / "two", {NAME: ([[1, 0]], [[1], [0]])}, **config)
    with pytest.raises(InputError, match=told):
        merge_adapters([one, two], tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two"}


def test_wrong_arguments_and_broken_adapters(tmp_path: Path) -> None:
    one = adapter(tmp_path / "one", {NAME: ([[1, 0]], [[1], [0]])})
    zero = adapter(tmp_path / "zero", {NAME: ([[0, 0]], [[1], [0]])})
    out = tmp_path / "out"
    for arguments, told in (
        ({"method": "ties"}, "field 'method': ties is no sum of updates"),
        ({"method": "multislerp", "space": "weight"}, "field 'space': adapters are differences"),
        ({"method": "linear", "normalize": False}, "field 'normalize': would scale the base too"),
        ({"method": "slerp", "on_zero": "error", "folders": [one, zero]},
         "'on_zero': module '.*h.0.q': is zero in models"),
        ({"rank": 0}, "field 'rank': must be a whole number above 0, got 0"),
        ({"weights": [1, 2]}, "need a finite number for each of 1 models"),
        ({"folders": [tmp_path]}, "is no adapter: it has no adapter_config.json"),
        ({"folders": [one, adapter(tmp_path / "c", {NAME: ([[1, 0, 0]], [[1], [0]])})]},
         r"module '.*h\.0\.q' is \(2, 3\), but \(2, 2\) in another"),
        ({"folders": [adapter(tmp_path / "d", {NAME: ([[1, 0], [0, 1]], [[1], [0]])})]}, "has factors of shapes"),
        ({"folders": [adapter(tmp_path / "e", {NAME: ([[1, math.inf]], [[1], [0]])})]}, "not finite"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=told):
            merge_adapters(**{"folders": [one], "output": out, **arguments})  # type: ignore[arg-type]
    save_file({f"{NAME}.lora_A.weight": torch.ones(1, 2)}, one / ADAPTER)
    with pytest.raises(InputError, match="has one factor of two"):
        merge_adapters([one], out)
    save_file({f"{NAME}.lora_magnitude_vector": torch.ones(2)}, one / ADAPTER)
    with pytest.raises(InputError, match="magnitude_vector' is no LoRA factor"):
        merge_adapters([one], out)
    (one / ADAPTER).unlink()
    with pytest.raises(InputError, match=r"has no adapter_model\.safetensors"):
        merge_adapters([one], out)
    assert not out.exists()


def test_bases_of_other_names_with_the_same_files(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"w": torch.ones(3)}, tmp_path / name / WEIGHTS)
    pair = {NAME: ([[1, 0]], [[1], [0]])}
    folders = [adapter(tmp_path / f"to_{name}", pair, base_model_name_or_path=str(tmp_path / name)) for name in "ab"]
    assert merge_adapters(folders, tmp_path / "out")["base"] == str(tmp_path / "a")
    save_file({"w": torch.zeros(3)}, tmp_path / "b" / WEIGHTS)
    with pytest.raises(InputError, match="name the base if they are one"):
        merge_adapters(folders, tmp_path / "no")
    assert merge_adapters(folders, tmp_path / "named", base="hub/base")["base"] == "hub/base"


def test_adapters_in_folders_of_sentence_transformers(tmp_path: Path) -> None:
    folders = [adapter(tmp_path / name, {NAME: ([[1, 0]], [[1], [0]])}) for name in ("one", "two")]
    for folder in folders:
        (folder / "modules.json").write_text(json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "2_Dense"}]))
        for part in ("1_Pooling", "2_Dense"):
            (folder / part).mkdir()
            (folder / part / "config.json").write_text('{"mode": "mean"}')
        save_file({"linear.weight": torch.eye(2)}, folder / "2_Dense" / WEIGHTS)
    merge_adapters(folders, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "1_Pooling" / "config.json").read_text()) == {"mode": "mean"}
    assert torch.equal(load_file(tmp_path / "out" / "2_Dense" / WEIGHTS)["linear.weight"], torch.eye(2))
    save_file({"linear.weight": torch.ones(2, 2)}, folders[1] / "2_Dense" / WEIGHTS)
    with pytest.raises(InputError, match="modules with weights of their own are not merged"):
        merge_adapters(folders, tmp_path / "no")
