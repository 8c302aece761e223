"""Tiny presets: real Hugging Face architectures at small sizes with a committed tokenizer, all offline.

They ship no weights; the caller initialises them from a fixed seed. All read text with one byte-level vocabulary
(``nano-qwen3`` with its first quarter), so ordinary text has the same ids everywhere and any UTF-8 text survives a
round trip (one leading space excepted, see below); only the special tokens, at the end of the vocabulary, differ:

=============== ====================== ============== ================= ======================================
preset          a text becomes         end (eos)      padding           others
=============== ====================== ============== ================= ======================================
tiny-qwen3      ``text``               ``<|im_end|>`` ``<|endoftext|>`` ``<|im_start|>``
nano-qwen3      ``text``               ``<|im_end|>`` ``<|endoftext|>`` ``<|im_start|>``
tiny-llama      ``<s> text``           ``</s>``       ``<pad>``         ``<unk>``
tiny-bert       ``[CLS] text [SEP]``   ``[SEP]``      ``[PAD]``         ``[MASK] [UNK]``
tiny-qwen2-vl   ``text``               ``<|im_end|>`` ``<|endoftext|>`` ``<|im_start|>``, ``<mask>`` and vision's
tiny-qwen2_5-vl ``text``               ``<|im_end|>`` ``<|endoftext|>`` ``<|im_start|>``, ``<mask>`` and vision's
=============== ====================== ============== ================= ======================================

The last two also read images, as 4 to 64 tokens between ``<|vision_start|>`` and ``<|vision_end|>``
(:func:`preset_images`).

A missing space before the first word is supplied (and taken away again in decoding), so that the first word has the
same token as elsewhere; so is one after a special token. Digits are tokens of their own.
``tools/build_preset_vocabulary.py`` builds the vocabulary.
"""

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from json import loads
from typing import TYPE_CHECKING, Any

from lit_core.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedTokenizerFast

VOCAB_SIZE = 4096  # rows of the embedding matrix; a few at the end stay unused
SMALL_VOCAB_SIZE = 1024
SPECIAL_TOKENS = 8  # rows kept free for special tokens
MAX_LENGTH = 256  # tokens that the tokenizers keep by default; longer texts cost minutes on two cores
MAX_POSITIONS = 1024  # tokens that the models can read
DIGIT = "[0-9]"


@dataclass(frozen=True)
class Preset:
    """One tiny architecture.

    Args:
        name: What users write as ``--model.backbone``.
        config_class: Name of the configuration class in ``transformers``.
        sizes: Arguments of the configuration, token ids excepted.
        roles: Special tokens by the tokenizer's role, in the order of their ids.
        extra: Further special tokens, after those.
        template: Post-processing of one text and of a pair, in the notation of ``tokenizers``.
        vision: Arguments of the vision tower's configuration; ``sizes`` are then those of the language model.
    """

    name: str
    config_class: str
    sizes: dict[str, Any]
    roles: dict[str, str]
    extra: tuple[str, ...] = ()
    template: tuple[str, str] | None = None
    vision: dict[str, Any] | None = None
    special_tokens: tuple[str, ...] = field(init=False)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix."""
        return int(self.sizes.get("vocab_size", VOCAB_SIZE))

    def __post_init__(self) -> None:
        object.__setattr__(self, "special_tokens", tuple(dict.fromkeys([*self.roles.values(), *self.extra])))


_DECODER = {
    "hidden_size": 128,
    "intermediate_size": 320,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": MAX_POSITIONS,
    "tie_word_embeddings": True,
}
_SMALL_DECODER = {
    **_DECODER,
    "vocab_size": SMALL_VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "head_dim": 16,
}
_ENCODER = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": MAX_POSITIONS,
}
_READER = {  # of images and text
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_POSITIONS,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 4, 4]},
    "tie_word_embeddings": True,
}
_TOWER = {"depth": 2, "num_heads": 4, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
_READER_ROLES = {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>", "mask_token": "<mask>"}
VISION_TOKENS = {  # fields of the configuration
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}
PRESETS: dict[str, Preset] = {
    preset.name: preset
    for preset in (
        Preset(
            "tiny-qwen3",
            "Qwen3Config",
            _DECODER,
            {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
            extra=("<|im_start|>",),
        ),
        Preset(
            "nano-qwen3",
            "Qwen3Config",
            _SMALL_DECODER,
            {"pad_token": "<|endoftext|>", "eos_token": "<|im_end|>"},
            extra=("<|im_start|>",),
        ),
        Preset(
            "tiny-llama",
            "LlamaConfig",
            _DECODER,
            {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"},
            template=("<s> $A", "<s> $A <s>:1 $B:1"),
        ),
        Preset(
            "tiny-bert",
            "BertConfig",
            _ENCODER,
            {
                "pad_token": "[PAD]",
                "unk_token": "[UNK]",
                "cls_token": "[CLS]",
                "sep_token": "[SEP]",
                "mask_token": "[MASK]",
                "eos_token": "[SEP]",
            },
            template=("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1"),
        ),
        Preset(
            "tiny-qwen2-vl",
            "Qwen2VLConfig",
            _READER,
            _READER_ROLES,
            extra=("<|im_start|>", *VISION_TOKENS.values()),
            vision={**_TOWER, "embed_dim": 64, "mlp_ratio": 2, "hidden_size": 96},
        ),
        Preset(
            "tiny-qwen2_5-vl",
            "Qwen2_5_VLConfig",
            _READER,
            _READER_ROLES,
            extra=("<|im_start|>", *VISION_TOKENS.values()),
            vision={
                **_TOWER,
                "hidden_size": 64,
                "intermediate_size": 128,
                "out_hidden_size": 96,
                "window_size": 56,  # pixels: the first block attends within 2 x 2 merged patches, the second everywhere
                "fullatt_block_indexes": [1],
            },
        ),
    )
}


def is_preset(name: str) -> bool:
    """Say whether ``name`` is one of the tiny presets."""
    return name in PRESETS


def _preset(name: str) -> Preset:
    if name not in PRESETS:
        raise InputError(f"unknown preset '{name}'; write one of {', '.join(PRESETS)}")
    return PRESETS[name]


def preset_config(name: str, **overrides: Any) -> "PreTrainedConfig":
    """Build the configuration of a preset.

    Args:
        name: A key of ``PRESETS``.
        **overrides: Fields of the configuration class to set otherwise, e.g. ``num_hidden_layers=2``; of a
            vision-language model, fields of its language model.

    Raises:
        InputError: The preset, or an overridden field, does not exist.
    """
    import transformers

    preset = _preset(name)
    config_class: Callable[..., PreTrainedConfig] = getattr(transformers, preset.config_class)
    first = ordinary_size(preset.vocab_size)
    ids = {token: first + row for row, token in enumerate(preset.special_tokens)}
    special = {f"{role}_id": ids.get(preset.roles.get(role, "")) for role in ("pad_token", "bos_token", "eos_token")}
    values = {"vocab_size": VOCAB_SIZE, **preset.sizes, **special}
    known = config_class().get_text_config().to_dict().keys() | values.keys()
    if unknown := sorted(overrides.keys() - known):
        raise InputError(f"{preset.config_class} has no field '{unknown[0]}'", field=unknown[0])
    values |= overrides
    if preset.vision is None:
        return config_class(**values)
    tokens = {name: ids[token] for name, token in VISION_TOKENS.items()}
    tied = {"tie_word_embeddings": values["tie_word_embeddings"]}
    return config_class(text_config=deepcopy(values), vision_config=deepcopy(preset.vision), **tokens, **tied)


def preset_images(name: str) -> dict[str, Any]:
    """How a preset's images are prepared, in the form of ``preprocessor_config.json``; empty if it reads none.

    Raises:
        InputError: The preset does not exist.
    """
    vision = _preset(name).vision
    if vision is None:
        return {}
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": vision["patch_size"],
        "merge_size": vision["spatial_merge_size"],
        "temporal_patch_size": vision["temporal_patch_size"],
        "size": {"shortest_edge": 56 * 56, "longest_edge": 64 * 28 * 28},  # pixels of the whole image
    }


def preset_tokenizer(name: str) -> "PreTrainedTokenizerFast":
    """Build the tokenizer of a preset; padding is on the right, the maximum length ``MAX_LENGTH``.

    Raises:
        InputError: The preset does not exist.
    """
    from tokenizers import AddedToken, Tokenizer, processors
    from transformers import PreTrainedTokenizerFast

    preset = _preset(name)
    backend = Tokenizer.from_str(
        _ordinary_tokenizer(preset.vocab_size).to_str()
    )  # a copy: what is added below belongs to one preset
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in preset.special_tokens])
    if preset.template is not None:
        single, pair = preset.template
        used = [(token, backend.token_to_id(token)) for token in preset.special_tokens if token in pair]
        backend.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=used)
    inputs = ["input_ids", "attention_mask"]
    fast: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast
    return fast(
        tokenizer_object=backend,
        model_max_length=MAX_LENGTH,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=inputs if preset.config_class != "BertConfig" else [*inputs, "token_type_ids"],
        extra_special_tokens=list(preset.extra),
        **preset.roles,
    )


def merges() -> list[tuple[str, str]]:
    """Return the merges of the committed vocabulary, in the order in which they apply."""
    lines = loads(files("lit_core").joinpath("presets_data/merges.json").read_text(encoding="utf-8"))
    return [(left, right) for left, right in (line.split(" ") for line in lines)]


@cache
def ordinary_size(vocab_size: int = VOCAB_SIZE) -> int:
    """Return the number of ordinary tokens of a preset's vocabulary; the special ones follow."""
    return 256 + len(_merges_of(vocab_size))


def _merges_of(vocab_size: int) -> list[tuple[str, str]]:
    """Return the merges that a vocabulary has room for; a smaller one has the first, most frequent ones."""
    return merges()[: vocab_size - SPECIAL_TOKENS - 256]


@cache
def _ordinary_tokenizer(vocab_size: int) -> Any:
    from tokenizers import pre_tokenizers

    pairs = _merges_of(vocab_size)
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(left + right for left, right in pairs)]
    return byte_level_tokenizer({token: row for row, token in enumerate(tokens)}, pairs)


def byte_level_tokenizer(vocabulary: dict[str, int], pairs: list[tuple[str, str]]) -> Any:
    """Build the bare ``tokenizers.Tokenizer`` without special tokens; the vocabulary's builder uses it too."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    digits = pre_tokenizers.Split(Regex(DIGIT), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel(add_prefix_space=True), digits])
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    return tokenizer
