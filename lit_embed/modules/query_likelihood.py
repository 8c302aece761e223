"""Query likelihood with attention stop: the training loss in three equal forms, and scoring from cached end columns."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lit_core.backbones import cache_name, text_model, unwrap
from lit_core.errors import InputError
from lit_core.lm_head import IGNORE_INDEX, cross_entropy, token_log_probs
from lit_core.progress import track
from lit_core.sharding import full_tensor
from lit_core.tokens import Tokens, plan_chunks, plan_equal_chunks
from lit_embed.functional.masks import attention_stop, causal
from lit_embed.modules.encoder import CPU_CHUNK_TOKENS, GPU_CHUNK_TOKENS
from lit_embed.modules.split_attention import SplitLayout, use_split_attention

Form = Literal["split", "two_pass", "dense"]
LossScope = Literal["query", "document_and_query"]


@dataclass
class DocumentColumns:
    """What query tokens may see of documents: the end token, layer by layer.

    Args:
        keys_values: ``(N, layers, 2, key heads, D)``.
        end_hidden: Final state of the end token ``(N, width)``, which predicts the first query token.
        end_index: Long ``(N,)``, position of the end token.
    """

    keys_values: Tensor
    end_hidden: Tensor
    end_index: Tensor


class QueryLikelihood(nn.Module):
    """``log p(query | end token of the document)`` under a causal language model (LLM-QL, card section 2).

    Args:
        model: A transformers causal language model, plain or with adapters.
        pad_id: Fills padded batches.
        form: How attention stop is computed: ``split`` two mask-free attention calls a layer; ``two_pass`` documents
            first, then queries on the end token's cached column; ``dense`` one 4D mask, the reference. All are exact.
        stop: Attention stop; False lets query tokens see the whole document.
        chunk_tokens: Padded tokens a forward pass takes at once; by default 512 on a CPU and 32,768 on a GPU.
    """

    def __init__(
        self, model: nn.Module, pad_id: int, form: Form = "split", stop: bool = True, chunk_tokens: int | None = None
    ) -> None:
        super().__init__()
        self.model = model
        self.pad_id, self.form, self.stop, self.chunk_tokens = pad_id, form, stop, chunk_tokens
        self.equal_chunks = False  # sharded models: every rank must run the same number of forward passes
        if form == "split" and stop:
            language_model = unwrap(model)
            if language_model.config._attn_implementation not in ("sdpa", "attention_stop_split"):
                raise InputError(
                    f"form split needs sdpa attention, got {language_model.config._attn_implementation}; use form dense"
                )
            use_split_attention(language_model)

    def forward(self, documents: Tokens, queries: Tokens, scope: LossScope = "query") -> Tensor:
        """Token-mean negative log-likelihood of a batch of pairs (card section 2.4).

        Args:
            documents: Document tokens up to and including the end token.
            queries: Query tokens with their own end token.
            scope: Which tokens are predicted.

        Returns:
            Loss in nats a token, shape ``()``, float32.
        """
        states, labels = [], []
        chunks, idle = self._plan_pairs(documents, queries)
        for rows in chunks:
            chunk_states, chunk_labels = self.label_states(documents, queries, rows, scope)
            states.append(chunk_states)
            labels.append(chunk_labels)
        loss = cross_entropy(torch.cat(states), *self._head(torch.cat(labels)))
        for rows in idle:
            loss = loss + self.label_states(documents, queries, rows, scope)[0].sum() * 0
        return loss

    def pair_log_likelihood(self, documents: Tokens, queries: Tokens) -> Tensor:
        """``log p(query | document)`` of each pair in nats, summed over the query's tokens and its end: ``(B,)``."""
        total = torch.zeros(len(queries), device=queries.ids.device)
        chunks, idle = self._plan_pairs(documents, queries)
        for number, rows in enumerate(chunks + idle):
            states, labels = self.label_states(documents, queries, rows, "query")
            weight, targets, bias = self._head(labels)
            if number < len(chunks):
                owner = torch.tensor([row for row in rows for _ in range(queries.lengths[row])], device=total.device)
                total = total.index_add(0, owner, token_log_probs(states, weight, targets, bias).log_probs)
        return total

    def label_states(
        self, documents: Tokens, queries: Tokens, rows: Sequence[int], scope: LossScope
    ) -> tuple[Tensor, Tensor]:
        """States that predict, and what they predict, of some pairs: ``(n, width)`` and Long ``(n,)``, row by row."""
        if not self.stop or self.form == "dense":
            return self._dense(documents, queries, rows, scope)
        if self.form == "split":
            return self._split(documents, queries, rows, scope)
        return self._two_pass(documents, queries, rows, scope)

    @torch.no_grad()
    def columns(self, documents: Tokens) -> DocumentColumns:
        """Run documents once and keep their end tokens' keys, values and final states."""
        found: dict[int, tuple[Tensor, Tensor]] = {}
        chunks, idle = self._plan(documents.lengths, documents)
        for rows in chunks + idle:
            cache, hidden, end = self._first_pass(*documents.pad(rows, self.pad_id))
            here = torch.arange(len(rows), device=end.device)
            pairs = torch.stack([torch.stack(layer, 1) for layer in _end_columns(cache, end)], 1)
            found |= {row: (pairs[i], hidden[i, end[i]]) for i, row in zip(here.tolist(), rows, strict=True)}
        ordered = [found[row] for row in range(len(documents))]
        end_index = torch.tensor(documents.lengths, device=documents.ids.device) - 1
        return DocumentColumns(torch.stack([k for k, _ in ordered]), torch.stack([h for _, h in ordered]), end_index)

    @torch.no_grad()
    def score(self, columns: DocumentColumns, pairs: Tensor, queries: Tokens, keep_end: bool = True) -> Tensor:
        """``log p(query | document)`` from cached columns; a pair costs its query's tokens alone.

        Args:
            columns: Cached documents.
            pairs: Long ``(P, 2)``: number of a query, number of a document.
            queries: Query tokens with their end token.
            keep_end: Count the query's end token.

        Returns:
            Float32 ``(P,)`` in nats, summed over tokens.
        """
        lengths = [queries.lengths[query] for query in pairs[:, 0].tolist()]
        scores = torch.empty(len(pairs), device=queries.ids.device)
        chunks, idle = self._plan(lengths, queries)
        for rows in track(chunks + idle, "query likelihood", unit="chunk"):
            chosen = pairs[rows]
            ids, valid = queries.pad(chosen[:, 0].tolist(), self.pad_id)
            document = chosen[:, 1]
            hidden = self._second_pass(
                [(layer[:, 0], layer[:, 1]) for layer in columns.keys_values[document].unbind(1)],
                ids,
                columns.end_index[document],
            )
            states = torch.cat([columns.end_hidden[document][:, None], hidden[:, :-1]], dim=1)
            weight, targets, bias = self._head(ids.flatten())
            log_probs = token_log_probs(states.flatten(0, 1), weight, targets, bias).log_probs.view(ids.shape)
            counted = (
                valid.bool()
                if keep_end
                else valid.bool()
                & valid.roll(-1, 1).bool().index_fill(1, torch.tensor([ids.shape[1] - 1], device=ids.device), False)
            )
            scores[torch.tensor(rows, device=scores.device)] = (log_probs * counted).sum(1)
        return scores

    def _plan_pairs(self, documents: Tokens, queries: Tokens) -> tuple[list[list[int]], list[list[int]]]:
        return self._plan([d + q for d, q in zip(documents.lengths, queries.lengths, strict=True)], documents)

    def _plan(self, lengths: list[int], tokens: Tokens) -> tuple[list[list[int]], list[list[int]]]:
        """Rows of each forward pass, and idle passes to be dropped, which sharded models alone have."""
        device = tokens.ids.device
        budget = self.chunk_tokens or (CPU_CHUNK_TOKENS if device.type == "cpu" else GPU_CHUNK_TOKENS)
        return plan_equal_chunks(lengths, budget, device) if self.equal_chunks else (plan_chunks(lengths, budget), [])

    def _head(self, targets: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        head = unwrap(self.model).get_output_embeddings()
        bias = getattr(head, "bias", None)
        return full_tensor(head.weight), targets, None if bias is None else full_tensor(bias)

    def _states(self, **inputs: Any) -> Tensor:
        return text_model(self.model)(use_cache=False, **inputs).last_hidden_state

    def _dense(
        self, documents: Tokens, queries: Tokens, rows: Sequence[int], scope: LossScope
    ) -> tuple[Tensor, Tensor]:
        """Form 1: one sequence ``[document, end, query]`` a row, attention stop as a 4D mask (none without a stop)."""
        sequences = [_slice(documents, row) + _slice(queries, row) for row in rows]
        ids, valid = Tokens.from_lists(sequences).to(documents.ids.device).pad(range(len(rows)), self.pad_id)
        end = torch.tensor([documents.lengths[row] - 1 for row in rows], device=ids.device)
        inputs: dict[str, Any] = {"input_ids": ids}
        if self.form == "dense":
            dtype = next(self.model.parameters()).dtype
            build = attention_stop if self.stop else causal
            inputs["attention_mask"] = build(valid.bool(), end, dtype)
        hidden = self._states(**inputs)
        labels = torch.where(valid.bool(), ids, IGNORE_INDEX)[:, 1:]
        first = end if scope == "query" else torch.zeros_like(end)
        position = torch.arange(labels.shape[1], device=ids.device)
        keep = (position >= first[:, None]) & (labels != IGNORE_INDEX)
        return hidden[:, :-1][keep], labels[keep]

    def _split(
        self, documents: Tokens, queries: Tokens, rows: Sequence[int], scope: LossScope
    ) -> tuple[Tensor, Tensor]:
        """Form 4: ``[document, end, padding | query, padding]`` in one pass of two causal calls a layer."""
        document_ids, document_valid = documents.pad(rows, self.pad_id)
        query_ids, query_valid = queries.pad(rows, self.pad_id)
        start, end = document_ids.shape[1], document_valid.sum(1) - 1
        hidden = self._states(
            input_ids=torch.cat([document_ids, query_ids], dim=1),
            position_ids=_positions(start, query_ids.shape[1], end),
            attention_mask=torch.zeros(1, 1, 1, 1, device=end.device),  # 4D is handed through; the layers ignore it
            split=SplitLayout(start, end),
        )
        blocks = (hidden[:, :start], hidden[:, start:], document_ids, document_valid, query_ids, query_valid, end)
        return _pick_labels(*blocks, scope)

    def _two_pass(
        self, documents: Tokens, queries: Tokens, rows: Sequence[int], scope: LossScope
    ) -> tuple[Tensor, Tensor]:
        """Form 5: documents with a cache, then queries on the end tokens' columns."""
        document_ids, document_valid = documents.pad(rows, self.pad_id)
        query_ids, query_valid = queries.pad(rows, self.pad_id)
        cache, document_hidden, end = self._first_pass(document_ids, document_valid)
        query_hidden = self._second_pass(_end_columns(cache, end), query_ids, end)
        blocks = (document_hidden, query_hidden, document_ids, document_valid, query_ids, query_valid, end)
        return _pick_labels(*blocks, scope)

    def _first_pass(self, ids: Tensor, valid: Tensor) -> tuple[Any, Tensor, Tensor]:
        model = text_model(self.model)
        output = model(input_ids=ids, use_cache=True)
        cache = getattr(output, cache_name(model))
        if cache is None or cache.get_seq_length() != ids.shape[1]:  # activation checkpointing drops it in training
            raise InputError("form two_pass needs the key-value cache: use form split with gradient checkpointing")
        return cache, output.last_hidden_state, valid.sum(1) - 1

    def _second_pass(self, columns: list[tuple[Tensor, Tensor]], ids: Tensor, end: Tensor) -> Tensor:
        from transformers import DynamicCache

        cache = DynamicCache()
        for layer, (key, value) in enumerate(columns):
            cache.update(key[:, :, None], value[:, :, None], layer)
        positions = end[:, None] + 1 + torch.arange(ids.shape[1], device=ids.device)
        model = text_model(self.model)
        named = {cache_name(model): cache}
        return model(input_ids=ids, position_ids=positions, use_cache=True, **named).last_hidden_state


def _slice(tokens: Tokens, row: int) -> list[int]:
    start = sum(tokens.lengths[:row])
    return tokens.ids[start : start + tokens.lengths[row]].tolist()


def _end_columns(cache: Any, end: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Key and value ``(B, key heads, D)`` of each row's end token, layer by layer."""
    rows = torch.arange(len(end), device=end.device)
    return [(layer.keys[rows, :, end], layer.values[rows, :, end]) for layer in cache.layers]


def _positions(document_length: int, query_length: int, end: Tensor) -> Tensor:
    """Positions ``(B, L)``: the query goes on behind the end token, whatever padding lies between."""
    document = torch.arange(document_length, device=end.device).expand(len(end), -1)
    return torch.cat([document, end[:, None] + 1 + torch.arange(query_length, device=end.device)], dim=1)


def _pick_labels(
    document_hidden: Tensor,
    query_hidden: Tensor,
    document_ids: Tensor,
    document_valid: Tensor,
    query_ids: Tensor,
    query_valid: Tensor,
    end: Tensor,
    scope: LossScope,
) -> tuple[Tensor, Tensor]:
    """Predicting states and labels, pair by pair; the end token's state predicts the first query token."""
    rows = torch.arange(len(end), device=end.device)
    states = torch.cat([document_hidden[rows, end][:, None], query_hidden[:, :-1]], dim=1)
    labels, keep = query_ids, query_valid.bool()
    if scope == "document_and_query":
        states = torch.cat([document_hidden[:, :-1], states], dim=1)
        labels = torch.cat([document_ids[:, 1:], labels], dim=1)
        keep = torch.cat([document_valid[:, 1:].bool(), keep], dim=1)
    return states[keep], labels[keep]
