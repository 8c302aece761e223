"""Which parameters are treated as one module by gradient surgery (MGS card, 2.3).

A granularity maps the names of the trainable parameters to modules; every one of them lies in exactly one.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from torch import nn

Granularity = Literal["param", "linear", "block", "layer", "global"]
Kind = Literal["attention", "mlp", "norm", "embedding", "head", "other"]
KINDS: tuple[Kind, ...] = ("attention", "mlp", "norm", "embedding", "head", "other")

ADAPTER = re.compile(r"\.(?:lora_\w+|base_layer)(?=\.|$)")  # peft's parts of a target
LAYER = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
NORM = re.compile(r"norm|(?:^|\.|_)ln(?:_|\d|\.|$)", re.IGNORECASE)
ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
MLP = re.compile(r"mlp|feed_?forward|ffn|moe|experts|intermediate|output|fc\d?|[a-z]_proj", re.IGNORECASE)
EMBEDDING = re.compile(r"embed|(?:^|\.)w[tp]e(?=\.|$)", re.IGNORECASE)
HEAD = re.compile(r"(?:^|\.)(?:lm_head|score|classifier)(?=\.|$)")
BEFORE_ATTENTION = ("input_layernorm", "ln_1", "ln1", "attention_norm", "norm1")
BEFORE_MLP = ("pre_feedforward_layernorm", "ln_2", "ln2", "ffn_norm", "norm2")


@dataclass(frozen=True)
class Part:
    """A module of a partition.

    Args:
        name: Path that its parameters share, as far as it goes.
        layer: Number of the layer that it lies in; None outside of layers.
        place: Its name inside the layer, or outside of layers; the same in every layer.
        kind: What it is; ``other`` where it has parameters of several kinds.
        size: Number of its parameters, of the whole model.
    """

    name: str
    layer: int | None
    place: str
    kind: Kind
    size: int


@dataclass(frozen=True)
class Partition:
    """The trainable parameters of a module, each once, and where they belong.

    Args:
        names: Of the parameters.
        parameters: Tied ones once.
        index: Number of each parameter's part.
        parts: What the parameters are taken together to.
    """

    names: tuple[str, ...]
    parameters: tuple[nn.Parameter, ...]
    index: tuple[int, ...]
    parts: tuple[Part, ...]

    def drop_gradients(self) -> None:
        """Forget what stands in the parameters' ``grad``."""
        for parameter in self.parameters:
            parameter.grad = None


def partition(module: nn.Module, granularity: Granularity | Mapping[str, str] = "param") -> Partition:
    """Take trainable parameters together.

    ``param`` has each by itself, as the authors' code does; ``linear`` the weight and bias of one layer, and the
    adapters of one target; ``block`` the self-attention and the feed-forward part of each layer, as the paper's
    text has it, a norm in front of either with it, and each of embedding, last norm and head alone; ``layer`` each
    whole layer; ``global`` everything.

    Args:
        module: Any module; layers are told by the first number in a parameter's path.
        granularity: One of the above, or the part of each trainable parameter by name.

    Raises:
        ValueError: Nothing is trainable, or a mapping that misses a parameter or names an unknown one.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    if not named:
        raise ValueError("nothing is trainable: there is no gradient to operate on")
    names = [name for name, _ in named]
    if isinstance(granularity, str):
        owners = [part_of(name, granularity, names) for name in names]
    else:
        wrong = set(names) ^ set(granularity)
        if wrong:
            name = min(wrong)
            what = "does not know" if name in names else "names a parameter that is not trainable here:"
            raise ValueError(f"a granularity has to map each trainable parameter to a part; this one {what} '{name}'")
        owners = [granularity[name] for name in names]
    keys = list(dict.fromkeys(owners))
    index = [keys.index(owner) for owner in owners]
    parts = [_part(key, [pair for pair, owner in zip(named, owners, strict=True) if owner == key]) for key in keys]
    return Partition(tuple(names), tuple(parameter for _, parameter in named), tuple(index), tuple(parts))


def part_of(name: str, granularity: Granularity, names: list[str]) -> str:
    """Name of the part that a parameter belongs to.

    Args:
        name: Of the parameter.
        granularity: See :func:`partition`.
        names: Of all trainable parameters, which tell what a norm stands in front of.

    Raises:
        ValueError: An unknown granularity.
    """
    if granularity == "param":
        return name
    if granularity == "global":
        return "all"
    if granularity not in ("linear", "block", "layer"):
        raise ValueError(f"granularity must be param, linear, block, layer or global, got '{granularity}'")
    owner = _owner(name)
    layer = LAYER.search(owner)
    if granularity == "linear" or layer is None:
        return owner
    prefix = owner[: layer.end()]
    if granularity == "layer":
        return prefix
    return f"{prefix}.{_block(owner[layer.end() + 1 :], prefix, names)}".rstrip(".")


def kind_of(name: str) -> Kind:
    """What a parameter is, by its path."""
    owner = _owner(name)
    layer = LAYER.search(owner)
    inside = owner[layer.end() :] if layer else owner
    if NORM.search(inside):
        return "norm"
    if layer is None:
        return "embedding" if EMBEDDING.search(owner) else "head" if HEAD.search(owner) else "other"
    return "attention" if ATTENTION.search(inside) else "mlp" if MLP.search(inside) else "other"


def _owner(name: str) -> str:
    """Path of the layer that holds a parameter: without ``weight`` and ``bias``, and without an adapter's parts."""
    adapter = ADAPTER.search(name)
    return name[: adapter.start()] if adapter else name.rpartition(".")[0]


def _block(inside: str, prefix: str, names: list[str]) -> str:
    """Block of a parameter whose path inside its layer this is."""
    first = inside.partition(".")[0]
    siblings = {name[len(prefix) + 1 :].partition(".")[0] for name in names if name.startswith(f"{prefix}.")}
    if NORM.search(first):
        if first == "post_attention_layernorm":  # behind attention in Gemma and OLMo 2, in front of the rest in Llama
            behind = "pre_feedforward_layernorm" in siblings or "input_layernorm" not in siblings
            return "attention" if behind else "mlp"
        if first in BEFORE_ATTENTION:
            return "attention"
        if first in BEFORE_MLP or first == "post_feedforward_layernorm":
            return "mlp"
        return first
    return "attention" if ATTENTION.search(first) else "mlp" if MLP.search(first) else first


def _part(name: str, members: list[tuple[str, nn.Parameter]]) -> Part:
    kinds = {_kind_in(member, name) for member, _ in members}
    layers = {match[1] if (match := LAYER.search(member)) else None for member, _ in members}
    layer, match = layers.pop() if len(layers) == 1 else None, LAYER.search(name)
    place = name[match.end() + 1 :] or "layer" if match and layer is not None else name
    size = sum(parameter.numel() for _, parameter in members)
    return Part(name, None if layer is None else int(layer), place, kinds.pop() if len(kinds) == 1 else "other", size)


def _kind_in(member: str, part: str) -> Kind:
    """Kind of a parameter as a member of a part: a norm that joins a block is of the block's kind."""
    last = part.rpartition(".")[2]
    return last if last in ("attention", "mlp") and LAYER.search(part) else kind_of(member)  # type: ignore[return-value]
