"""Decoding of Llama-like models over a cache in which the samples of a prompt share its keys and values.

The layers' own modules do the work (projections with their adapters, norms, feed-forward), so the weights are those in
training. Only the attention is ours: a row attends to its prompt, stored once for all samples of it, and to its own
response, and the two parts are merged by their normalisers.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lit_core.backbones import text_model, unwrap
from lit_core.generation.graphs import Capture, Layout, StepGraphs, rounded

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # others change with the length of the text
PREFILL_TOKENS = 2048  # padded tokens of prompts read at once; they are sorted by length, so few are padding
LENGTH_STEP = 64  # on a GPU the cache is read up to a multiple of this, so that few shapes occur


class Part(NamedTuple):
    """Attention to some of the keys: outputs ``(..., D)`` and the log of the softmax's sum ``(..., 1)``, float32."""

    outputs: Tensor
    normaliser: Tensor


class Stored(NamedTuple):
    """Keys and values of a response, of each layer ``(2, H, L, D)``."""

    layers: list[Tensor]


def is_supported(model: nn.Module) -> bool:
    """Say whether a causal language model is of the kind that this cache decodes exactly."""
    config = unwrap(model).config
    rope = getattr(config, "rope_parameters", None) or {}
    sliding = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    sliding = sliding or any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or [])
    return config.model_type in MODEL_TYPES and rope.get("rope_type", "default") in ROPE_TYPES and not sliding


class SharedCache:
    """Rows (samples) that decode together, and the prompts that they belong to.

    Args:
        model: A causal language model, bare or with adapters, in evaluation mode.
        prompts: Slots for prompts.
        rows: Slots for rows.
        prompt_length: Most tokens of a prompt.
        response_length: Most tokens of a response.
        capture: Records decode steps (see :class:`StepGraphs`). Then the step is padded: with rows in the free slots
            behind the running ones, and with prompts that no row belongs to.
    """

    joins_running = True  # new rows can enter beside running ones

    def __init__(
        self,
        model: nn.Module,
        prompts: int,
        rows: int,
        prompt_length: int,
        response_length: int,
        capture: Capture | None = None,
    ) -> None:
        inner = text_model(model)
        self.inner, self.head = inner, unwrap(model).get_output_embeddings()
        attention = inner.layers[0].self_attn
        self.head_dim, self.scaling = attention.head_dim, attention.scaling
        self.kv_heads = inner.config.num_key_value_heads
        self.group = inner.config.num_attention_heads // self.kv_heads
        weight = inner.embed_tokens.weight
        self.device, self.dtype = weight.device, weight.dtype
        self.graphs = None if capture is None else StepGraphs(capture)
        self.bucketed = self.device.type == "cuda" or self.graphs is not None
        layers = len(inner.layers)

        def buffers(slots: int, length: int) -> list[Tensor]:
            shape = (2, slots, self.kv_heads, length, self.head_dim)  # keys and values
            return [torch.zeros(shape, device=self.device, dtype=self.dtype) for _ in range(layers)]  # hidden, not NaN

        self.prompt_cache, self.cache = buffers(prompts, prompt_length), buffers(rows, response_length)
        self.most_prompts, self.most_rows = prompts, rows
        positions = torch.arange(prompt_length + response_length, device=self.device)[None]
        probe = torch.zeros(1, device=self.device, dtype=self.dtype)
        self.cos, sin = (table[0] for table in inner.rotary_emb(probe, positions))
        half = self.head_dim // 2
        self.sin = torch.cat([-sin[:, :half], sin[:, half:]], dim=1)  # the sign of the rotation
        self.norms = [
            _stacked_norms(layer.self_attn, self.group * self.kv_heads, self.kv_heads) for layer in inner.layers
        ]
        self.last_states = torch.zeros(prompts, inner.config.hidden_size, device=self.device, dtype=self.dtype)
        self.prompt_lengths: list[int] = []
        self.names: list[int | None] = []  # of the prompt in each slot; with a name it stays until it is closed
        self.slots: list[int] = []  # prompt of each row
        self.lengths: list[int] = []  # response tokens of each row that the cache holds

    def __len__(self) -> int:
        return len(self.slots)

    def has_room(self, rows: int, prompts: int) -> bool:
        """Whether so many further prompts with so many rows in all fit."""
        return len(self.prompt_lengths) + prompts <= self.most_prompts and len(self) + rows <= self.most_rows

    def admit(
        self, prompts: Sequence[Sequence[int]], counts: Sequence[int], names: Sequence[int] | None = None
    ) -> Tensor:
        """Read prompts and begin rows of them, behind those that run.

        Args:
            prompts: Token ids of each new prompt.
            counts: Rows of each.
            names: One a prompt that stays, also without rows, until :meth:`close`.

        Returns:
            Logits of the first token of every new row ``(sum of counts, V)``.
        """
        first = len(self.prompt_lengths)
        self.prompt_lengths += [len(prompt) for prompt in prompts]
        self.names += names or [None] * len(prompts)
        for number, count in enumerate(counts):
            self.slots += [first + number] * count
            self.lengths += [0] * count
        order = sorted(range(len(prompts)), key=lambda number: -len(prompts[number]))
        logits, start = [], 0
        while start < len(order):
            width = len(prompts[order[start]])
            chunk = order[start : start + max(1, PREFILL_TOKENS // width)]
            logits.append(self._prefill([prompts[number] for number in chunk], [first + number for number in chunk]))
            start += len(chunk)
        back = torch.empty(len(order), dtype=torch.long)
        back[torch.tensor(order)] = torch.arange(len(order))
        rows = back.repeat_interleave(torch.tensor(counts)).to(self.device)
        self._lay_out()
        return torch.cat(logits)[rows]

    def store(self, rows: Sequence[int]) -> list[Stored]:
        """Copies of what rows hold of their responses."""
        return [Stored([cache[:, row, :, : self.lengths[row]].clone() for cache in self.cache]) for row in rows]

    def branch(self, names: Sequence[int], stored: Sequence[Stored], lengths: Sequence[int]) -> None:
        """Begin rows that hold the first tokens of stored responses already.

        Args:
            names: Prompt of each.
            stored: What each begins with.
            lengths: How many tokens of it.
        """
        for kept, length in zip(stored, lengths, strict=True):
            row = len(self.lengths)
            for cache, layer in zip(self.cache, kept.layers, strict=True):
                cache[:, row, :, :length] = layer[:, :, :length]
            self.lengths.append(length)
        self.slots += [self.names.index(name) for name in names]
        self._lay_out()

    def restart(self, names: Sequence[int]) -> Tensor:
        """Begin rows of prompts that have been read; returns the logits of their first tokens ``(B, V)``."""
        slots = [self.names.index(name) for name in names]
        self.slots += slots
        self.lengths += [0] * len(slots)
        self._lay_out()
        return self.head(self.last_states[torch.tensor(slots, device=self.device)])

    def close(self, name: int) -> None:
        """Let a prompt go with the last of its rows."""
        self.names[self.names.index(name)] = None

    def step(self, tokens: Tensor) -> Tensor:
        """Take the last token of each row (Long ``(B,)``) and return the logits of the next ``(B, V)``."""
        length = max(self.lengths) + 1
        if self.bucketed:
            length = _read_length(length, self.cache)
        states = self.inner.embed_tokens(tokens)
        if self.graphs is None:
            same = self.lengths[0] if not self.bucketed and len(set(self.lengths)) == 1 else None
            states = self._decode(states, self.held, self.layout, length, same)
        else:
            # the embeddings may have hooks; the head's logits would take a buffer a graph, and callers may keep them
            padded = F.pad(states, (0, 0, 0, len(self.held) - len(states)))
            states = self.graphs(self._decode, padded, self.held, self.layout, length)[: len(states)]
        logits = self.head(states)
        self.lengths = [held + 1 for held in self.lengths]
        self.held += 1
        return logits

    def keep(self, rows: Sequence[int]) -> list[int]:
        """Drop all other rows; the last ones move into the gaps.

        Returns:
            Which of the old rows stands at each place now.
        """
        places = _filled_gaps(rows)
        longest = max((self.lengths[row] for row in rows), default=0)
        _move(self.cache, places, longest)
        self.slots = [self.slots[row] for row in places]
        self.lengths = [self.lengths[row] for row in places]
        staying = {slot for slot, name in enumerate(self.names) if name is not None}
        prompts = _filled_gaps(sorted(staying | set(self.slots)))
        longest = max((self.prompt_lengths[slot] for slot in prompts), default=0)
        _move(self.prompt_cache, prompts, longest)
        self.last_states[: len(prompts)] = self.last_states[torch.tensor(prompts, dtype=torch.long)]
        self.prompt_lengths = [self.prompt_lengths[slot] for slot in prompts]
        self.names = [self.names[slot] for slot in prompts]
        new_slot = {old: new for new, old in enumerate(prompts)}
        self.slots = [new_slot[slot] for slot in self.slots]
        if self.slots:
            self._lay_out()
        return places

    def _lay_out(self) -> None:
        """What stays the same from step to step: which rows belong to which prompt, and the prompts' masks."""
        members: list[list[int]] = [[] for _ in self.prompt_lengths]
        place = []
        for row, slot in enumerate(self.slots):
            place.append((slot, len(members[slot])))
            members[slot].append(row)
        width, longest = max(len(rows) for rows in members), max(self.prompt_lengths)
        slots, lengths, held = self.slots, self.prompt_lengths, self.lengths
        if self.graphs is not None:
            # rows of padding write to free slots, never further than the longest row, and read what somebody sees
            more = min(rounded(len(slots)), self.most_rows) - len(slots)
            slots, held, place = slots + [0] * more, held + [0] * more, place + [(0, 0)] * more
            more = min(rounded(len(lengths)), self.most_prompts) - len(lengths)
            lengths, members = lengths + [1] * more, members + [[]] * more
            width, longest = rounded(width), _read_length(longest, self.prompt_cache)
        grid = torch.tensor([[*rows, *[0] * (width - len(rows))] for rows in members], device=self.device)
        owners, ranks = torch.tensor(place, device=self.device).T[..., None]
        heads = torch.arange(self.kv_heads, device=self.device)
        tokens = torch.tensor(lengths, device=self.device)
        hidden = torch.arange(longest, device=self.device) >= tokens[:, None]
        self.layout = Layout(
            offsets=tokens[torch.tensor(slots, device=self.device)],
            grid=(grid[:, None] * self.kv_heads + heads[:, None]).flatten(),
            place=((owners * self.kv_heads + heads) * width + ranks).flatten(),
            prompt_mask=self._additive(hidden)[:, None, None],
        )
        self.held = torch.tensor(held, device=self.device)

    def _additive(self, hidden: Tensor) -> Tensor:
        return torch.zeros(hidden.shape, device=self.device).masked_fill_(hidden, -torch.inf)

    def _prefill(self, prompts: list[Sequence[int]], slots: list[int]) -> Tensor:
        """Fill the prompts' slots and return the logits behind their last tokens ``(P, V)``."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
        width = len(prompts[0])  # the longest stands first
        ids = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in prompts], device=self.device)
        cos, sin = self.cos[:width, None], self.sin[:width, None]
        places = torch.tensor(slots, device=self.device)
        states = self.inner.embed_tokens(ids)

        for number, layer in enumerate(self.inner.layers):
            queries, keys, values = (heads.transpose(1, 2) for heads in self._projections(number, states, cos, sin))
            for cache, new in zip(self.prompt_cache[number], (keys, values), strict=True):
                cache[places, :, :width] = new  # (P, H, L, D)
            mixed = F.scaled_dot_product_attention(  # padding stands behind, so that causality hides it
                queries, keys, values, is_causal=True, scale=1.0, enable_gqa=self.group > 1
            )
            states = self._finish_layer(layer, states, mixed.transpose(1, 2).flatten(2))
        last = self.inner.norm(states[torch.arange(len(prompts), device=self.device), lengths - 1])
        self.last_states[places] = last
        return self.head(last)

    def _decode(self, states: Tensor, held: Tensor, layout: Layout, length: int, same: int | None = None) -> Tensor:
        """All layers for one token a row ``(B, D)``, which enters the cache; may be captured, see :class:`StepGraphs`.

        Args:
            states: Embeddings ``(B, D)``.
            held: Response tokens of each row that the cache holds, Long ``(B,)``.
            layout: Of rows and prompts.
            length: Read of the rows' caches.
            same: The number that all rows hold, where that is known.
        """
        count = len(states)
        rows = torch.arange(count, device=self.device)
        positions = layout.offsets + held
        cos, sin = self.cos[positions, None], self.sin[positions, None]  # (B, 1, D)
        mask = None  # not needed where all rows hold as many tokens
        if same is None:
            ahead = torch.arange(length, device=self.device) > held[:, None]
            mask = self._additive(ahead)[:, None, None]  # (B, 1, 1, L)
        for number, layer in enumerate(self.inner.layers):
            queries, *pair = self._projections(number, states, cos, sin)
            for cache, new in zip(self.cache[number], pair, strict=True):
                if same is None:
                    cache[rows, :, held] = new
                else:
                    cache[:count, :, same] = new  # the same without an index
            queries = queries.view(count, self.kv_heads, self.group, self.head_dim)
            own = _attend(queries, self.cache[number][:, :count, :, :length], mask)
            mixed = _merged(self._attend_to_prompts(number, queries, layout), own)
            states = self._finish_layer(layer, states, mixed.flatten(1).to(states.dtype))
        return self.inner.norm(states)

    def _attend_to_prompts(self, number: int, queries: Tensor, layout: Layout) -> Part:
        """Queries ``(B, H, G, D)`` of all rows of a prompt together, against its keys, which are read once."""
        prompts, _, _, length = layout.prompt_mask.shape
        gathered = queries.flatten(0, 1).index_select(0, layout.grid)
        gathered = gathered.view(prompts, self.kv_heads, -1, self.head_dim)
        part = _attend(gathered, self.prompt_cache[number][:, :prompts, :, :length], layout.prompt_mask)
        apart = (tensor.view(len(layout.grid), self.group, -1) for tensor in part)
        return Part(*(tensor.index_select(0, layout.place).view(*queries.shape[:3], -1) for tensor in apart))

    def _projections(self, number: int, states: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated and scaled queries ``(..., heads, D)``; rotated keys and values ``(..., H, D)``."""
        layer = self.inner.layers[number]
        attention = layer.self_attn
        normed = layer.input_layernorm(states)
        joined = torch.cat([attention.q_proj(normed), attention.k_proj(normed)], dim=-1)
        joined = joined.view(*states.shape[:-1], -1, self.head_dim)
        if (norms := self.norms[number]) is not None:
            joined = norms.weight * F.rms_norm(joined.float(), (self.head_dim,), eps=norms.epsilon).to(self.dtype)
        rotated = torch.addcmul(joined * cos, joined.roll(self.head_dim // 2, -1), sin)
        queries, keys = rotated.split([self.group * self.kv_heads, self.kv_heads], dim=-2)
        return queries * self.scaling, keys, attention.v_proj(normed).view(keys.shape)

    def _finish_layer(self, layer: Any, states: Tensor, mixed: Tensor) -> Tensor:
        states = states + layer.self_attn.o_proj(mixed)
        return states + layer.mlp(layer.post_attention_layernorm(states))


class _Norms(NamedTuple):
    """Norms of queries and keys, a row of the weight ``(heads, D)`` a head."""

    weight: Tensor
    epsilon: float


def _stacked_norms(attention: Any, query_heads: int, key_heads: int) -> _Norms | None:
    if not hasattr(attention, "q_norm"):
        return None
    queries, keys = attention.q_norm, attention.k_norm
    weight = torch.cat([queries.weight.expand(query_heads, -1), keys.weight.expand(key_heads, -1)])
    return _Norms(weight, queries.variance_epsilon)


def _attend(queries: Tensor, cache: Tensor, mask: Tensor | None) -> Part:
    """Attention of scaled queries ``(B, H, Q, D)`` to keys and values ``(2, B, H, L, D)``."""
    keys, values = cache
    scores = (queries @ keys.transpose(-1, -2)).float()
    if mask is not None:
        scores += mask
    largest = scores.amax(-1, keepdim=True)
    weights = scores.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    return Part(weights.to(values.dtype) @ values / total, largest + total.log())


def _merged(one: Part, two: Part) -> Tensor:
    """Attention over the keys of both parts ``(B, H, G, D)``."""
    return torch.lerp(one.outputs, two.outputs, (two.normaliser - one.normaliser).sigmoid())


def _read_length(length: int, buffers: list[Tensor]) -> int:
    """How far buffers ``(2, slots, H, L, D)`` are read for so many tokens."""
    return min(-(-length // LENGTH_STEP) * LENGTH_STEP, buffers[0].shape[3])


def _filled_gaps(kept: Sequence[int]) -> list[int]:
    """Kept numbers in an order that leaves as many as possible where they are: the last ones fill the gaps."""
    staying = {number for number in kept if number < len(kept)}
    movers = iter(number for number in kept if number >= len(kept))
    return [number if number in staying else next(movers) for number in range(len(kept))]


def _move(buffers: list[Tensor], places: Sequence[int], length: int) -> None:
    moved = [(new, old) for new, old in enumerate(places) if new != old]
    if not moved or length == 0:
        return
    new, old = (torch.tensor(numbers, device=buffers[0].device) for numbers in zip(*moved, strict=True))
    for buffer in buffers:
        buffer[:, new, :, :length] = buffer[:, old, :, :length]
