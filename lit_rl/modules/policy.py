"""A causal language model as a policy: states before response tokens, their log-probabilities, a frozen reference."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lit_core.backbones import (
    BackboneConfig,
    Lora,
    Quantization,
    load_backbone,
    load_tokenizer,
    text_model,
    transformer_blocks,
    unwrap,
)
from lit_core.errors import InputError
from lit_core.generation.shared_cache import is_supported
from lit_core.lm_head import TokenLogProbs, Truncation, token_log_probs
from lit_core.sharding import full_tensor, shard, tie_head
from lit_rl.modules.layout import Chunk
from lit_rl.modules.trie import Nodes


class Policy(nn.Module):
    """A causal language model with its tokenizer.

    Dropout is off: probabilities at the rollout and in training would differ.

    Args:
        backbone: Preset, local folder or hub id of a causal language model.
        loading: Precision, attention, checkpointing.
        lora: Adapters.
        quantization: Load the backbone in 8 or 4 bits.
        temperature: Divides the logits, in sampling and in training.
        reference: Keep a frozen copy of the starting weights; with adapters the weights without them serve.

    Raises:
        InputError: The backbone is no causal language model, or its logits are not a plain product of states and head.
    """

    def __init__(
        self,
        backbone: str,
        loading: BackboneConfig,
        lora: Lora,
        quantization: Quantization | None = None,
        temperature: float = 1.0,
        reference: bool = False,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.tokenizer = load_tokenizer(backbone, loading.trust_remote_code)
        self.model = load_backbone(backbone, "causal_lm", loading, lora, quantization)
        drop_nothing(self.model)
        _check_head(unwrap(self.model), backbone)
        self.adapted = lora.r > 0
        if reference and not self.adapted:
            self.frozen = load_backbone(backbone, "causal_lm", loading, None, quantization).requires_grad_(False)
            drop_nothing(self.frozen)

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Tokens that end a response: those of the generation settings and the tokenizer's."""
        settings = getattr(unwrap(self.model), "generation_config", None)
        found = getattr(settings, "eos_token_id", None)
        listed = found if isinstance(found, list) else [found]
        return tuple(dict.fromkeys(i for i in (self.tokenizer.eos_token_id, *listed) if i is not None))

    @property
    def shares_prompts(self) -> bool:
        """Whether rows can stand behind a shared prompt: full attention that takes a mask as it is given."""
        return is_supported(self.model) and unwrap(self.model).config._attn_implementation in ("sdpa", "eager")

    def shard(self, mesh: Any) -> None:
        """Shard the weights over the data-parallel ranks (FSDP2)."""
        for model in (self.model, *([self.frozen] if "frozen" in dict(self.named_children()) else [])):
            shard(text_model(model), mesh, transformer_blocks(model))
            tie_head(unwrap(model))

    @contextmanager
    def whole_head(self) -> Iterator[None]:
        """Plain weights in the head inside the block: a tied one is sharded, but lies outside of what FSDP gathers."""
        head = unwrap(self.model).get_output_embeddings()
        sharded = head.weight
        if isinstance(sharded, DTensor):
            head.weight = nn.Parameter(full_tensor(sharded.detach()), requires_grad=False)
        try:
            yield
        finally:
            head.weight = sharded

    def states(self, chunk: Chunk, model: nn.Module | None = None) -> Tensor:
        """Hidden states before each response token of a chunk ``(N, D)``."""
        model = self.model if model is None else model
        return states_before(text_model(model), chunk)

    def log_probs(
        self,
        states: Tensor,
        targets: Tensor,
        entropy: bool = False,
        truncation: Truncation | None = None,
        model: nn.Module | None = None,
        nodes: Nodes | None = None,
    ) -> TokenLogProbs:
        """Log-probabilities of tokens at the temperature, from the states before them; see ``token_log_probs``.

        With ``nodes`` the head's work is done once for tokens that are the same node of a trie.
        """
        head = unwrap(self.model if model is None else model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        weight = full_tensor(head.weight)
        bias = None if bias is None else full_tensor(bias)
        if nodes is None:
            return token_log_probs(states, weight, targets, bias, entropy, truncation, self.temperature)
        found = token_log_probs(
            states[nodes.first], weight, targets[nodes.first], bias, entropy, truncation, self.temperature
        )
        entropies = (None if values is None else values[nodes.number] for values in found[1:])
        return TokenLogProbs(found.log_probs[nodes.number], *entropies)

    @torch.no_grad()
    def reference_log_probs(self, chunk: Chunk, targets: Tensor) -> Tensor:
        """Log-probabilities under the weights that training started from ``(N,)``."""
        frozen = self.model if self.adapted else self.frozen
        peft: Any = self.model
        with peft.disable_adapter() if self.adapted else nullcontext():
            return self.log_probs(self.states(chunk, frozen), targets, model=frozen, nodes=chunk.nodes).log_probs


def states_before(model: nn.Module, chunk: Chunk) -> Tensor:
    """States of a model without a head before each response token of a chunk ``(N, D)``."""
    mask = chunk.mask
    if mask is not None:  # additive: a bool mask would be turned into one at every layer
        dtype = next(model.parameters()).dtype
        mask = torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, torch.finfo(dtype).min)
    kwargs: dict[str, Any] = {"input_ids": chunk.input_ids, "attention_mask": mask, "use_cache": False}
    if mask is not None:
        kwargs["position_ids"] = chunk.positions
    return model(**kwargs).last_hidden_state.flatten(0, 1)[chunk.states]


def drop_nothing(model: nn.Module) -> None:
    """Set every dropout probability to 0, those that a module keeps as a plain number included."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in list(vars(module).items()):
            if isinstance(value, float) and ("dropout" in name or name == "layerdrop"):
                setattr(module, name, 0.0)


def _check_head(model: Any, backbone: str) -> None:
    """Refuse what :meth:`Policy.log_probs` would read wrongly."""
    head = model.get_output_embeddings()
    if not any(child is head for child in model.children()):  # BERT's stands behind layers of its own
        raise InputError(f"a policy needs a causal language model with a plain head, '{backbone}' has none")
    if not isinstance(head, nn.Linear):
        raise InputError("adapters on the language-model head are not read", field="lora.targets")
    for name in ("final_logit_softcapping", "logit_scale", "logits_scaling"):
        value = getattr(model.config, name, None)
        if value not in (None, 1):
            raise InputError(f"the logits of '{backbone}' are not a plain product: {name} is {value}")
