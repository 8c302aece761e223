"""A reward model: the sequence classifier of transformers with one label, whose logit is the reward of a text."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lit_core.backbones import BackboneConfig, Lora, Quantization, load_backbone, load_tokenizer, unwrap
from lit_core.errors import InputError
from lit_core.export import new_folder, save_model
from lit_core.files import read_json, write_json
from lit_core.packed import packed_linears
from lit_core.presets import is_preset
from lit_core.progress import track
from lit_core.tokens import Tokens, plan_chunks, plan_equal_chunks
from lit_rl.modules.dialogues import Dialogue, DialogueTokenizer

CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS = 512, 32768
QUANTISED = {"quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"}  # where transformers and peft look for it
CLASSIFIER = "ForSequenceClassification"  # how transformers' classes are called


class ScoreLayer(nn.Linear):
    """The layer that gives the reward, in float32 whatever the model's type: bfloat16 tells 2.00 from 2.01 no more."""

    def forward(self, states: Tensor) -> Tensor:
        """Rewards ``(..., 1)``, float32."""
        with torch.autocast(states.device.type, enabled=False):
            bias = None if self.bias is None else self.bias.float()
            return F.linear(states.float(), self.weight.float(), bias)


class RewardModel(nn.Module):
    """Rewards of texts.

    Causal backbones read the reward off the last token; bidirectional ones off what their classifier pools, mostly the
    first token. An over-long dialogue keeps its end, where the reply stands.

    Args:
        model: A sequence classifier of transformers with one label (see :func:`build_reward_model`).
        tokenizer: Its fast tokenizer.
        max_length: Most tokens of a text, special ones included.
    """

    def __init__(self, model: Any, tokenizer: Any, max_length: int) -> None:
        super().__init__()
        self.model, self.tokenizer = model, tokenizer
        self.tokenize = DialogueTokenizer(tokenizer, max_length)
        self.equal_chunks = False  # sharded models: every rank must run the same number of forward passes

    @classmethod
    def load(cls, folder: Path | str, loading: BackboneConfig | None = None) -> "RewardModel":
        """Load a trained reward model, in evaluation mode.

        Args:
            folder: What :meth:`save` has written, or any sequence classifier with one label, also by its hub id.
            loading: Precision, attention.

        Raises:
            InputError: There is no such model, or it has no head that gives a reward.
        """
        return build_reward_model(str(folder), loading=loading, trained=True).eval()

    def forward(self, tokens: Tokens) -> Tensor:
        """Rewards ``(N,)``, float32, in the order of the texts; the model runs over length-sorted chunks."""
        device = tokens.ids.device
        budget = CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS
        if self.equal_chunks:
            chunks, idle = plan_equal_chunks(tokens.lengths, budget, device)
        else:
            chunks, idle = plan_chunks(tokens.lengths, budget), []
        rewards = torch.cat([self._read(tokens, rows) for rows in chunks])
        order = torch.tensor([row for rows in chunks for row in rows], device=device)
        rewards = torch.empty_like(rewards).index_copy(0, order, rewards)
        for rows in idle:
            rewards = rewards + self._read(tokens, rows).sum() * 0
        return rewards

    @torch.no_grad()
    def scores(self, texts: Sequence[Dialogue], block: int = 2048, progress: bool = True) -> Tensor:
        """Rewards of any number of texts, in evaluation mode; equal texts are read once.

        Args:
            texts: Texts, or dialogues as lists of messages.
            block: Texts tokenised at a time; bounds the memory.
            progress: Show a bar once this has taken two seconds.

        Returns:
            Float32 ``(N,)`` on the CPU.
        """
        rendered = [self.tokenize.text(text) for text in texts]
        distinct = sorted(set(rendered), key=len, reverse=True)  # neighbours of like length make tight chunks
        if not distinct:
            return torch.empty(0)
        device, training = next(self.model.parameters()).device, self.training
        self.eval()
        parts, starts = [], range(0, len(distinct), block)
        with packed_linears(self.model):
            for start in track(starts, "scoring texts", unit="block") if progress else starts:
                parts.append(self(self.tokenize(distinct[start : start + block]).to(device)).cpu())
        self.train(training)
        place = {text: row for row, text in enumerate(distinct)}
        return torch.cat(parts)[torch.tensor([place[text] for text in rendered])]

    def save(self, output: Path, form: str = "merged", base: str = "") -> None:
        """Write a folder for ``AutoModelForSequenceClassification``, or for its peft namesake.

        Args:
            output: Folder to write; must not exist, or be empty.
            form: ``merged`` writes whole weights, ``adapter`` the peft adapter with the head.
            base: Name of the backbone that was trained; an adapter names it.

        Raises:
            InputError: As in :func:`lit_core.export.save_model`.
        """
        from peft import PeftModel

        prefix = self.model.base_model_prefix
        inner = getattr(self.model, prefix)
        with new_folder(output) as folder:
            if form == "adapter":
                save_model(inner, folder, form, base, output)
                _add_head(folder, self.model)
            else:
                whole = self.model
                if isinstance(inner, PeftModel) and not _quantised(inner):
                    whole = deepcopy(whole)
                    setattr(whole, prefix, getattr(whole, prefix).merge_and_unload())
                save_model(whole, folder, form, base, output)
            self.tokenizer.save_pretrained(folder)

    def _read(self, tokens: Tokens, rows: Sequence[int]) -> Tensor:
        ids, valid = tokens.pad(rows, self.tokenizer.pad_token_id)
        return self.model(input_ids=ids, attention_mask=valid).logits[:, 0].float()


def build_reward_model(
    backbone: str,
    max_length: int | None = None,
    loading: BackboneConfig | None = None,
    lora: Lora | None = None,
    quantization: Quantization | None = None,
    trained: bool = False,
) -> RewardModel:
    """Load a backbone and put a head on it that gives one number: its own where it is a reward model, else a new one.

    Args:
        backbone: Preset, local folder or hub id.
        max_length: Most tokens of a text; None takes what the tokenizer and the model allow.
        loading: Precision, attention, checkpointing.
        lora: Adapters to add; the head is trained beside them.
        quantization: Load the backbone in 8 or 4 bits.
        trained: Refuse a backbone that has no head yet.

    Raises:
        InputError: What :func:`lit_core.backbones.load_backbone` raises, or an architecture without a classifier.
    """
    loading = loading or BackboneConfig()
    tokenizer = load_tokenizer(backbone, loading.trust_remote_code)
    base = _classifier_adapter_base(backbone)
    if base is not None and lora is not None and lora.r > 0:
        raise InputError(f"backbone '{backbone}' is the adapter of a reward model; export it as merged to train it on")
    has_head = _has_head(base or backbone, loading)
    if trained and base is None and not has_head:
        raise InputError(f"'{backbone}' is no reward model: it has no head with one label")
    with _no_load_report() if has_head else nullcontext():  # of the head, which is read afterwards
        inner = load_backbone(base or backbone, "encoder", loading, lora, quantization)
    model = _classifier(inner, base or backbone, has_head, loading, tokenizer.pad_token_id)
    if base is not None:
        model = _merged(model, backbone)
    if (lora is None or lora.r == 0) and _quantised(inner) is None:
        model.requires_grad_(True)  # a merged adapter leaves its model frozen
    positions = getattr(model.config, "max_position_embeddings", None) or tokenizer.model_max_length
    if max_length is not None and not 1 <= max_length <= positions:
        raise InputError(
            f"must lie between 1 and {positions}, what the backbone reads, got {max_length}", field="max_length"
        )
    return RewardModel(model, tokenizer, max_length or min(tokenizer.model_max_length, positions))


def _has_head(backbone: str, loading: BackboneConfig) -> bool:
    """Whether a backbone is a sequence classifier with one label."""
    if is_preset(backbone):
        return False
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(backbone, trust_remote_code=loading.trust_remote_code)
    except (OSError, ValueError):
        return False  # load_backbone says what is wrong, if anything is
    return config.num_labels == 1 and any(name.endswith(CLASSIFIER) for name in config.architectures or [])


@contextmanager
def _no_load_report() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _classifier(inner: Any, backbone: str, has_head: bool, loading: BackboneConfig, pad_id: int) -> Any:
    """Put a loaded encoder into its architecture's sequence classifier, with the backbone's head or a new one."""
    from transformers import AutoModelForSequenceClassification

    encoder = unwrap(inner)
    config = encoder.config
    config.num_labels, config.pad_token_id, config.use_cache = 1, pad_id, False
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(
                config, attn_implementation=loading.attention, trust_remote_code=loading.trust_remote_code
            )
    except ValueError as error:
        reason = str(error).split("\n")[0]
        raise InputError(f"backbone '{backbone}' has no sequence classifier: {reason}") from None
    prefix = model.base_model_prefix
    pooler = getattr(encoder, "pooler", None)
    if pooler is not None and getattr(getattr(model, prefix), "pooler", None) is None:
        encoder.pooler = None  # this classifier pools by itself
    elif pooler is not None:
        for parameter in pooler.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # load_backbone has frozen it
    setattr(model, prefix, inner)
    head = {name: module for name, module in model.named_children() if name != prefix}
    with torch.random.fork_rng(devices=[]):  # the same head in every process
        torch.manual_seed(loading.seed)
        for module in head.values():
            module.to_empty(device=encoder.device).to(encoder.dtype)
            module.apply(model._init_weights)
    if has_head:
        found = AutoModelForSequenceClassification.from_pretrained(
            backbone, dtype=encoder.dtype, trust_remote_code=loading.trust_remote_code
        )
        for name, module in head.items():
            module.load_state_dict(found.get_submodule(name).state_dict())
    for name in QUANTISED & vars(encoder).keys():
        setattr(model, name, getattr(encoder, name))
    _in_float32(model, head)
    return model


def _in_float32(model: nn.Module, head: Mapping[str, nn.Module]) -> None:
    """Exchange the head's last layer, the one that gives a single number."""
    for name, module in head.items():
        for inside, layer in module.named_modules():
            if isinstance(layer, nn.Linear) and layer.out_features == 1:
                exchanged = ScoreLayer(layer.in_features, 1, layer.bias is not None, device="meta")
                exchanged.weight, exchanged.bias = layer.weight, layer.bias
                model.set_submodule(f"{name}.{inside}".rstrip("."), exchanged)


def _quantised(inner: nn.Module) -> Any:
    """How the weights are quantised, or None."""
    return getattr(unwrap(inner), "quantization_method", None)


def _classifier_adapter_base(backbone: str) -> str | None:
    """Base model of a folder that holds the adapter of a sequence classifier."""
    folder = Path(backbone)
    if not (folder / "adapter_config.json").is_file() or (folder / "config.json").is_file():
        return None
    settings = read_json(folder / "adapter_config.json")
    return settings["base_model_name_or_path"] if settings.get("task_type") == "SEQ_CLS" else None


def _merged(model: Any, folder: str) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 for a property under its old name
        warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
        warnings.filterwarnings("ignore", "Merge lora module to .-bit linear")  # load_backbone says so
        return PeftModel.from_pretrained(model, folder).merge_and_unload()


def _add_head(folder: Path, model: Any) -> None:
    """Turn the adapter of an encoder into that of its classifier, with the head, as peft would have written it."""
    prefix, inside = model.base_model_prefix, "base_model.model."
    adapter = load_file(folder / "adapter_model.safetensors")
    tensors = {name.replace(inside, f"{inside}{prefix}.", 1): value for name, value in adapter.items()}
    saved = set[str]()
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" not in name:
            plain = name.replace(f"{prefix}.{inside}", f"{prefix}.", 1)
            tensors[inside + plain] = parameter.detach().cpu().contiguous()
            saved.add(plain.removeprefix(f"{prefix}.").partition(".")[0])
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    settings = read_json(folder / "adapter_config.json")
    write_json(folder / "adapter_config.json", settings | {"task_type": "SEQ_CLS", "modules_to_save": sorted(saved)})
