"""Batches of texts and of pairs, and the collators that make them; collators are picklable for loader workers."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from lit_core.errors import InputError
from lit_core.tokens import Tokens
from lit_embed.functional.corruption import Unit, corrupt_tokens, corrupt_words
from lit_embed.items import Kind
from lit_embed.modules.tokenization import TextTokenizer

Direction = Literal["document_to_query", "query_to_document", "both"]


@dataclass
class TextBatch:
    """Texts to encode.

    Args:
        ids: Their ids.
        tokens: Their tokens.
    """

    ids: list[str]
    tokens: Tokens


@dataclass
class PairBatch:
    """Queries and the distinct passages that stand against them.

    Args:
        tokens: ``B`` queries, then ``N`` passages.
        queries: ``B``.
        targets: Long ``(B,)``, number of each query's positive among the passages.
        passage_keys: Long ``(N,)``; equal keys mean the same document, on all ranks.
        positive_keys: Long ``(B, P)``, keys of all known positives of each query, padded with -1.
        own: Bool ``(B, N)``, True = the passage was drawn for this query.
        own_only: Bool ``(B,)``, True = this query is compared with its own passages alone.
        groups: Long ``(B, G)``, numbers of each query's own passages, its positive first; rows are filled up with it.
        teacher: Float ``(B, G)``, a teacher's scores of these, -inf where there is none; None without a teacher.
    """

    tokens: Tokens
    queries: int
    targets: Tensor
    passage_keys: Tensor
    positive_keys: Tensor
    own: Tensor
    own_only: Tensor
    groups: Tensor | None = None
    teacher: Tensor | None = None


@dataclass
class LikelihoodBatch:
    """Documents up to their end token, and queries with theirs; row by row a pair.

    Args:
        documents: Documents, corrupted in training.
        queries: Queries without a prompt, each with an end token.
        shuffled: Other documents, to measure what the document tells; None in training, or where all are the same.
    """

    documents: Tokens
    queries: Tokens
    shuffled: Tokens | None = field(default=None)


@lru_cache(maxsize=1 << 20)
def document_key(doc_id: str) -> int:
    """A 63-bit number for a document id, equal in every process."""
    return int.from_bytes(hashlib.blake2b(doc_id.encode(), digest_size=8).digest(), "big") >> 1


class TextCollator:
    """Rows ``{"id", "text"}`` to a :class:`TextBatch`."""

    def __init__(self, tokenizer: TextTokenizer, kind: Kind) -> None:
        self.tokenizer, self.kind = tokenizer, kind

    def __call__(self, rows: Sequence[Mapping[str, str]]) -> TextBatch:
        return TextBatch([row["id"] for row in rows], self.tokenizer([row["text"] for row in rows], self.kind))


class PairCollator:
    """Pair items to a :class:`PairBatch`; a document that several queries drew is encoded once."""

    def __init__(self, tokenizer: TextTokenizer) -> None:
        self.tokenizer = tokenizer

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> PairBatch:
        column: dict[str, int] = {}
        texts: list[str] = []
        for row in rows:
            for doc_id, text in zip(row["passage_ids"], row["passages"], strict=True):
                if doc_id not in column:
                    column[doc_id] = len(texts)
                    texts.append(text)
        own = torch.zeros(len(rows), len(texts), dtype=torch.bool)
        for number, row in enumerate(rows):
            own[number, [column[doc_id] for doc_id in row["passage_ids"]]] = True
        widest = max(len(row["positive_ids"]) for row in rows)
        keys = [[document_key(doc_id) for doc_id in row["positive_ids"]] for row in rows]
        queries = self.tokenizer([row["query"] for row in rows], "query")
        return PairBatch(
            tokens=Tokens.concatenate([queries, self.tokenizer(texts, "passage")]),
            queries=len(rows),
            targets=torch.tensor([column[row["passage_ids"][0]] for row in rows]),
            passage_keys=torch.tensor([document_key(doc_id) for doc_id in column]),
            positive_keys=torch.tensor([known + [-1] * (widest - len(known)) for known in keys]),
            own=own,
            own_only=torch.tensor([bool(row["own_group_only"]) for row in rows]),
            groups=_groups([[column[doc_id] for doc_id in row["passage_ids"]] for row in rows]),
            teacher=_teacher([row.get("scores") for row in rows], max(len(row["passage_ids"]) for row in rows)),
        )


def _groups(columns: Sequence[Sequence[int]]) -> Tensor:
    widest = max(map(len, columns))
    return torch.tensor([[*of, *[of[0]] * (widest - len(of))] for of in columns])


def _teacher(scores: Sequence[Sequence[float] | None], widest: int) -> Tensor | None:
    """Scores of rows of passages; a row without any says that the positive alone is right."""
    if all(of is None for of in scores):
        return None
    rows = [[0.0] if of is None else of for of in scores]
    return torch.tensor([[*of, *[-torch.inf] * (widest - len(of))] for of in rows])


class LikelihoodCollator:
    """Pair items to a :class:`LikelihoodBatch` of each query with its positive (LLM-QL, card sections 2.1 and 2.3).

    Every draw comes from the row's own seed, so that a batch is the same in any worker and after a restart.

    Args:
        tokenizer: Of the encoder, so that both stages wrap texts alike.
        rate: Share of the words to hide on the encoded side.
        unit: What is hidden, whole words or tokens.
        mask: What stands for a hidden word; the tokenizer's mask token where this string has no token.
        direction: Which side is generated; ``both`` draws one of the two for each row.
        shuffled: Also give each row the source of the next row that has another one.

    Raises:
        InputError: The mask string has no token and there is no mask token.
    """

    def __init__(
        self,
        tokenizer: TextTokenizer,
        rate: float,
        unit: Unit = "word",
        mask: str = "_",
        direction: Direction = "document_to_query",
        shuffled: bool = False,
    ) -> None:
        self.tokenizer, self.rate, self.unit, self.direction = tokenizer, rate, unit, direction
        self.shuffled = shuffled
        tokens = tokenizer.plain([mask])[0]
        self.mask = mask if tokens else tokenizer.tokenizer.mask_token
        if self.mask is None:
            raise InputError(f"the mask string {mask!r} has no token in this tokenizer, which has no mask token either")
        self.mask_id = tokens[-1] if tokens else tokenizer.tokenizer.mask_token_id

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> LikelihoodBatch:
        sources, targets = [], []
        for row in rows:
            generator = torch.Generator().manual_seed(row["seed"])
            coin = float(torch.rand((), generator=generator)) if self.direction == "both" else 1.0
            reverse = self.direction == "query_to_document" or coin < 0.5
            passage: tuple[str, Kind] = (row["passages"][0], "passage")
            query: tuple[str, Kind] = (row["query"], "query")
            source, target = (query, passage) if reverse else (passage, query)
            sources.append(self.source(*source, generator))
            targets.append(self.target(*target))
        others = _others(sources) if self.shuffled else []
        shuffled = Tokens.from_lists(others) if others else None
        return LikelihoodBatch(Tokens.from_lists(sources), Tokens.from_lists(targets), shuffled)

    def source(self, text: str, kind: Kind, generator: torch.Generator | None = None) -> list[int]:
        """The encoded side: corrupted, wrapped, ending with the end token."""
        if self.unit == "word":
            hidden = corrupt_words(text, self.rate, generator, mask=self.mask)
            return self.tokenizer([hidden], kind).ids.tolist()
        ids, start, stop = self.tokenizer.framed(text, kind)
        return ids[:start] + corrupt_tokens(ids[start:stop], self.rate, self.mask_id, generator) + ids[stop:]

    def target(self, text: str, kind: Kind) -> list[int]:
        """The generated side: no prompt, an end token, which is a target too."""
        length = self.tokenizer.lengths[kind]
        return [*self.tokenizer.plain([text], None if length is None else length - 1)[0], self.tokenizer.eos_id]


def _others(sources: list[list[int]]) -> list[list[int]]:
    """For each source the next different one, around the end; nothing where all are equal."""
    if all(source == sources[0] for source in sources):
        return []
    doubled = sources + sources
    return [next(other for other in doubled[row + 1 :] if other != source) for row, source in enumerate(sources)]
