"""Texts to tokens: prompts, suffix, end token, truncation that spares them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_core.errors import InputError
from lit_core.tokens import Tokens
from lit_embed.functional.pooling import Pooling
from lit_embed.items import Kind


@dataclass
class EncoderConfig:
    """How texts become vectors. What is left at None comes from a sentence-transformers folder, if the backbone is one.

    Args:
        pooling: ``mean``, ``cls``, ``last`` token, or ``eos`` (the tokenizer is made to append the end token); by
            default ``eos`` for decoders and ``mean`` for bidirectional backbones.
        normalize: Scale vectors to length 1; by default yes.
        dimensions: Keep the first values of each vector (matryoshka); by default all.
        query_prompt: Text put before each query.
        passage_prompt: Text put before each passage.
        suffix: Text put after every text, before the end token; never truncated.
        query_length: Most tokens of a query, everything included.
        passage_length: Most tokens of a passage, everything included.
        chunk_tokens: Padded tokens a forward pass takes at once; by default 512 on a CPU and 32,768 on a GPU.
    """

    pooling: Pooling | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    suffix: str = ""
    query_length: int | None = None
    passage_length: int | None = None
    chunk_tokens: int | None = None

    def __post_init__(self) -> None:
        for name in ("dimensions", "query_length", "passage_length", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")


class TextTokenizer:
    """Tokenises queries and passages; small and picklable, so that loader workers can hold it.

    The tokenizer's post-processor is rewritten so that the suffix and the end token are its own: truncation then keeps
    them, and an exported folder gives the same tokens in sentence-transformers and in plain transformers.

    Args:
        tokenizer: A fast tokenizer.
        config: Prompts, suffix and lengths.

    Raises:
        InputError: A length leaves no room for text.
    """

    def __init__(self, tokenizer: Any, config: EncoderConfig) -> None:
        self.tokenizer = end_with(tokenizer, config.suffix, config.pooling == "eos")
        self.prompts = {"query": config.query_prompt or "", "passage": config.passage_prompt or ""}
        self.lengths = {"query": config.query_length, "passage": config.passage_length}
        self.eos_id: int = self.tokenizer.eos_token_id
        for kind, length in self.lengths.items():
            room = len(self.tokenizer(self.prompts[kind])["input_ids"])
            if length is not None and length <= room:
                raise InputError(f"{kind}_length must exceed the {room} tokens of prompt, suffix and end, got {length}")

    def __call__(self, texts: Sequence[str], kind: Kind) -> Tokens:
        """Token ids of texts with prompt, suffix and end token, truncated before the suffix."""
        if len(texts) == 0:
            return Tokens.from_lists([])
        wrapped = [self.prompts[kind] + text for text in texts]
        length = self.lengths[kind]
        rows = self.tokenizer(wrapped, truncation=length is not None, max_length=length, return_attention_mask=False)
        return Tokens.from_lists(rows["input_ids"])

    def framed(self, text: str, kind: Kind) -> tuple[list[int], int, int]:
        """Token ids of a text, and where the text itself begins and ends among them.

        A token that holds the end of the prompt and the beginning of the text belongs to the text.
        """
        prompt, length = self.prompts[kind], self.lengths[kind]
        row = self.tokenizer(
            prompt + text, truncation=length is not None, max_length=length, return_offsets_mapping=True
        )
        before, after = _frame(self.tokenizer)
        ids: list[int] = row["input_ids"]
        stop = len(ids) - len(after)
        within = (at for at in range(len(before), stop) if row["offset_mapping"][at][1] > len(prompt))
        return ids, next(within, stop), stop

    def plain(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """Token ids of texts alone: no prompt, no special tokens."""
        rows = self.tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
        return [row[:max_length] for row in rows]


def end_with(tokenizer: Any, suffix: str, eos: bool) -> Any:
    """A copy of a fast tokenizer whose post-processor also appends a suffix and the end token.

    Raises:
        InputError: An end token is wanted and the tokenizer has none.
    """
    if eos and tokenizer.eos_token_id is None:
        raise InputError("eos pooling needs a tokenizer with an eos token; choose --model.encoder.pooling last or mean")
    before, after = _frame(tokenizer)
    ends = eos and tokenizer.eos_token_id in after[-1:]
    tail = tokenizer(suffix, add_special_tokens=False)["input_ids"] if suffix else []
    if after[: len(tail)] == tail:
        tail = []  # the tokenizer comes from an export, which has the suffix already
    if not tail and (ends or not eos):
        return tokenizer
    from tokenizers.processors import TemplateProcessing

    after = tail + after + ([tokenizer.eos_token_id] if eos and not ends else [])
    pieces = {f"<piece{number}>": token for number, token in enumerate(before + after)}
    names = list(pieces)
    template = " ".join([*names[: len(before)], "$A", *names[len(before) :]])
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=template,
        special_tokens=[
            {"id": name, "ids": [token], "tokens": [tokenizer.convert_ids_to_tokens(token)]}
            for name, token in pieces.items()
        ],
    )
    return tokenizer


def _frame(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Ids that the tokenizer's post-processor puts before and behind a text."""
    body = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    start = next(start for start in range(len(whole)) if whole[start : start + len(body)] == body)
    return whole[:start], whole[start + len(body) :]
