"""Backbones by hub id, local folder or preset: precision, attention, adapters, quantisation, checkpointing."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from torch import nn

from lit_core.errors import InputError
from lit_core.files import read_json
from lit_core.presets import PRESETS, is_preset, preset_config, preset_tokenizer
from lit_core.vision import default_targets, is_vision_language, towers

DType = Literal["float32", "bfloat16", "float16", "auto"]
Attention = Literal["sdpa", "eager", "flash_attention_2", "flex_attention"]
Quantization = Literal["int8", "nf4"]
Task = Literal["encoder", "causal_lm"]


@dataclass
class Lora:
    """Low-rank adapters (peft).

    Args:
        r: Rank; 0 trains the whole backbone without an adapter.
        alpha: The update is scaled by ``alpha / r``.
        dropout: Dropout probability before the adapter.
        targets: Names of the linear layers that get an adapter, matched at the end of the module's path; empty takes
            every linear layer but the language-model head, and in a vision-language model those of attention and MLPs
            (:func:`lit_core.vision.default_targets`).
        dora: Weight-decomposed adapters (DoRA).
        gaussian: Draw the adapters' first matrix from a normal distribution, not uniformly; the second is zero.
    """

    r: int = 0
    alpha: int = 64
    dropout: float = 0.1
    targets: list[str] = field(default_factory=list)
    dora: bool = False
    gaussian: bool = False


@dataclass
class BackboneConfig:
    """How a backbone is loaded.

    Args:
        dtype: Dtype of the weights; ``auto`` takes that of the checkpoint.
        attention: Attention implementation of transformers.
        gradient_checkpointing: Recompute activations in the backward pass.
        trust_remote_code: Run model code that comes with a hub repository.
        seed: Seed of the random weights of a preset and of adapters; the command line takes that of the run.
        init_std: Standard deviation of a preset's random weights; None takes that of its architecture, 0.02 mostly,
            which is made for widths of thousands.
    """

    dtype: DType = "float32"
    attention: Attention = "sdpa"
    gradient_checkpointing: bool = False
    trust_remote_code: bool = False
    seed: int = 0
    init_std: float | None = None

    def __post_init__(self) -> None:
        if self.init_std is not None and not self.init_std > 0:
            raise InputError(f"must be above 0, got {self.init_std}", field="loading.init_std")


def load_tokenizer(backbone: str, trust_remote_code: bool = False) -> Any:
    """Tokenizer of a backbone, a fast one, with a padding token and padding on the right.

    Raises:
        InputError: The backbone is unknown, or its tokenizer has no fast form or no token that could pad.
    """
    if is_preset(backbone):
        return preset_tokenizer(backbone)
    from transformers import AutoTokenizer

    folder = Path(backbone)
    base = None if (folder / "tokenizer.json").is_file() else adapter_base(backbone)  # an export has its own
    source = base or backbone
    tokenizer = _load(lambda: AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code), backbone)
    if not tokenizer.is_fast:
        raise InputError(f"backbone '{backbone}' has no fast tokenizer (tokenizer.json); convert it first")
    if tokenizer.pad_token is None:
        if tokenizer.eos_token is None:
            raise InputError(f"the tokenizer of backbone '{backbone}' has neither a pad nor an eos token")
        tokenizer.pad_token = tokenizer.eos_token  # attention masks are explicit and ends are found by position
    tokenizer.padding_side = "right"
    return tokenizer


def load_backbone(
    backbone: str,
    task: Task = "encoder",
    config: BackboneConfig | None = None,
    lora: Lora | None = None,
    quantization: Quantization | None = None,
) -> nn.Module:
    """Build a backbone.

    Args:
        backbone: Preset name, local folder (of a model, or of a peft adapter, which is merged), or hub id.
        task: ``encoder`` gives token states, ``causal_lm`` also a language-model head; a vision-language model comes
            with both its towers.
        config: How to load.
        lora: Adapters to add; rank 0 or None adds none.
        quantization: Load the linear layers in 8 or 4 bits (bitsandbytes); then only adapters can be trained. An
            adapter that is merged into such layers is rounded to their bits.

    Returns:
        A transformers model, or a peft model around it.

    Raises:
        InputError: Unknown backbone, a target that matches no module, or a quantisation that is not possible.
    """
    config = config or BackboneConfig()
    build = _preset if is_preset(backbone) else _pretrained
    model = build(backbone, task, config, quantization)
    if config.gradient_checkpointing:
        if quantization is None:
            model.enable_input_require_grads()  # frozen embeddings would cut the recomputed graph
        older = model.gradient_checkpointing_enable  # its name up to transformers 5.22
        getattr(model, "activation_checkpointing_enable", older)({"use_reentrant": False})
    pooler = getattr(model, "pooler", None)
    if pooler is not None:
        pooler.requires_grad_(False)  # token states do not need it, and DDP refuses trainable weights that no loss uses
    if lora is None or lora.r == 0:
        return model
    with torch.random.fork_rng(devices=[]):  # adapters too start alike in every process
        torch.manual_seed(config.seed)
        return add_adapter(model, lora, task)


def add_adapter(model: Any, lora: Lora, task: Task) -> nn.Module:
    """Wrap a model with adapters.

    Raises:
        InputError: A target matches no linear layer; the error names those there are.
    """
    from peft import LoraConfig, get_peft_model

    linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _is_linear(module)})
    names = [name for name, _ in model.named_modules()]
    for target in lora.targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise InputError(f"LoRA target '{target}' matches no module; this backbone has {', '.join(linear)}")
    pooling = [name for name in names if ".pooler." in f".{name}."]  # gives no token states
    everywhere = default_targets(model) if is_vision_language(unwrap(model).config) else "all-linear"
    settings = LoraConfig(
        r=lora.r,
        lora_alpha=lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=lora.targets or everywhere,
        exclude_modules=pooling or None,
        use_dora=lora.dora,
        init_lora_weights="gaussian" if lora.gaussian else True,
        task_type={"encoder": "FEATURE_EXTRACTION", "causal_lm": "CAUSAL_LM"}[task],
    )
    with _peft_warnings():
        return get_peft_model(model, settings)  # adapters in float32, whatever the backbone's type


def unwrap(model: nn.Module) -> Any:
    """The transformers model inside a peft model (its adapters stay injected), or the model itself."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def text_model(model: nn.Module) -> Any:
    """The part of a transformers model that gives token states, without its head."""
    inner: Any = unwrap(model)
    return getattr(inner, inner.base_model_prefix, inner)


def cache_name(model: nn.Module) -> str:
    """What a transformers model calls its key-value cache, in arguments and results: ``cache`` from 5.24 on."""
    return "cache" if "cache" in signature(model.forward).parameters else "past_key_values"


def transformer_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated layers, the longest list of modules (in each tower, if there are two): the units of sharding."""
    inner = text_model(model)
    found: list[nn.Module] = []
    for part in towers(inner) if is_vision_language(inner.config) else [inner]:
        lists = [list(module) for module in part.modules() if isinstance(module, nn.ModuleList)]
        longest: list[nn.Module] = max(lists, key=len, default=[])
        found += longest
    return found


@contextmanager
def _peft_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Merge lora module to .-bit linear")  # load_backbone says so
        yield


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear)  # bitsandbytes' layers derive from it


def _model_class(task: Task, config: Any) -> Any:
    from transformers import AutoModel, AutoModelForCausalLM, AutoModelForImageTextToText

    if task == "encoder":
        return AutoModel
    return AutoModelForImageTextToText if is_vision_language(config) else AutoModelForCausalLM


def _from_pretrained(source: str, task: Task, kwargs: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    settings = AutoConfig.from_pretrained(source, trust_remote_code=kwargs["trust_remote_code"])
    return _model_class(task, settings).from_pretrained(source, **kwargs)


def _preset(backbone: str, task: Task, config: BackboneConfig, quantization: Quantization | None) -> Any:
    settings = preset_config(backbone)
    if config.init_std is not None:
        settings.get_text_config().initializer_range = config.init_std
        if is_vision_language(settings):
            settings.vision_config.initializer_range = config.init_std
    with torch.random.fork_rng(devices=[]):  # the same weights in every process, whatever was drawn before
        torch.manual_seed(config.seed)
        try:
            model = _model_class(task, settings).from_config(settings, attn_implementation=config.attention)
        except (ValueError, ImportError) as error:
            raise InputError(f"preset '{backbone}' cannot be built as {task}: {error}") from None
    if quantization is not None:  # transformers quantises while it reads a checkpoint
        with TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = _pretrained(folder, task, config, quantization)
        model.config._name_or_path = model.name_or_path = ""  # an adapter would name the folder that is gone
        return model
    if config.dtype != "auto":
        for parameter in model.parameters():  # not the buffers: rotary frequencies stay float32, as in a loaded model
            parameter.data = parameter.data.to(getattr(torch, config.dtype))
    return model


def _pretrained(backbone: str, task: Task, config: BackboneConfig, quantization: Quantization | None) -> Any:
    base = adapter_base(backbone)
    kwargs: dict[str, Any] = {
        "dtype": config.dtype,
        "attn_implementation": config.attention,
        "trust_remote_code": config.trust_remote_code,
    }
    if quantization is not None and not _is_quantised(Path(base or backbone)):
        kwargs["quantization_config"] = _quantization(quantization, config)
    whole = task == "causal_lm" or (base is not None and _adapts_language_model(backbone))
    model = _load(lambda: _from_pretrained(base or backbone, "causal_lm" if whole else task, kwargs), backbone)
    if quantization is not None:
        from peft import prepare_model_for_kbit_training

        for module in model.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):  # evaluation packs the weights for such processors,
                module.support_avx512bf16_for_cpu = False  # and training would go on with the packed ones
        with _peft_warnings():
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=config.gradient_checkpointing)
    if base is not None:
        from peft import PeftModel

        with _peft_warnings():
            model = PeftModel.from_pretrained(model, backbone).merge_and_unload()
        if quantization is None and not _is_quantised(Path(base)):
            model.requires_grad_(True)  # peft has frozen it
    return text_model(model) if whole and task == "encoder" else model


def _adapts_language_model(backbone: str) -> bool:
    """Whether an adapter was trained with the language-model head above it, and so names its layers from there."""
    return read_json(Path(backbone) / "adapter_config.json").get("task_type") == "CAUSAL_LM"


def _is_quantised(folder: Path) -> bool:
    """Whether a local model was saved in 8 or 4 bits; it stays as it is."""
    settings = folder / "config.json"
    return settings.is_file() and "quantization_config" in read_json(settings)


def _quantization(quantization: Quantization, config: BackboneConfig) -> Any:
    from transformers import BitsAndBytesConfig

    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    compute = torch.float32 if config.dtype == "auto" else getattr(torch, config.dtype)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
    )


def adapter_base(backbone: str) -> str | None:
    """Base model of a folder that holds only a peft adapter."""
    folder = Path(backbone)
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        if not base:
            raise InputError(
                "the base model is missing", folder / "adapter_config.json", field="base_model_name_or_path"
            )
        return base
    return None


def _load(build: Callable[[], Any], backbone: str) -> Any:
    if Path(backbone).is_dir() and not any((Path(backbone) / f"{n}config.json").is_file() for n in ("", "adapter_")):
        raise InputError("this folder holds no model: config.json is missing", backbone)
    try:
        return build()
    except ImportError as error:
        raise InputError(
            f"backbone '{backbone}' asks for what is not installed: {str(error).splitlines()[0]}"
        ) from None
    except (OSError, ValueError) as error:  # transformers raises both for what it cannot find or read
        reason = str(error).strip().split("\n")[0]
        presets = ", ".join(PRESETS)
        raise InputError(
            f"backbone '{backbone}' is none of the presets ({presets}), no model folder, and cannot be read from the "
            f"hub: {reason}"
        ) from None
