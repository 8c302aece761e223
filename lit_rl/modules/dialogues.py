"""Dialogues to text and to tokens."""

from collections.abc import Mapping, Sequence
from typing import Any

from lit_core.tokens import Tokens

ROLES = {"system": "System", "user": "Human", "assistant": "Assistant"}  # as Anthropic's HH writes dialogues

Dialogue = str | Sequence[Mapping[str, str]]


def dialogue_text(dialogue: Dialogue, tokenizer: Any) -> str:
    r"""A dialogue as one text.

    Args:
        dialogue: A text, which stays as it is, or messages with ``role`` and ``content``.
        tokenizer: Its chat template is used; without one messages become ``\n\nHuman: ...\n\nAssistant: ...``.
    """
    if isinstance(dialogue, str):
        return dialogue
    if tokenizer.chat_template:
        text = tokenizer.apply_chat_template([dict(message) for message in dialogue], tokenize=False)
        return text.removeprefix(tokenizer.bos_token or "")  # tokenising adds it
    turns = ((ROLES.get(message["role"], message["role"]), message["content"]) for message in dialogue)
    return "".join(f"\n\n{role}: {content}" for role, content in turns)


class DialogueTokenizer:
    """Dialogues to tokens; an over-long one loses its beginning, never its end: there stands the reply.

    Args:
        tokenizer: A fast tokenizer; what it is saved with makes it truncate alike.
        max_length: Most tokens of a dialogue, special ones included.
    """

    def __init__(self, tokenizer: Any, max_length: int) -> None:
        self.tokenizer, self.max_length = tokenizer, max_length
        tokenizer.truncation_side, tokenizer.model_max_length = "left", max_length
        tokenizer.init_kwargs["truncation_side"] = "left"  # what save_pretrained writes

    def text(self, dialogue: Dialogue) -> str:
        """A dialogue as one text."""
        return dialogue_text(dialogue, self.tokenizer)

    def __call__(self, dialogues: Sequence[Dialogue]) -> Tokens:
        """Token ids; a text without any token is read as one padding token."""
        texts = [self.text(dialogue) for dialogue in dialogues]
        ids = self.tokenizer(texts, truncation=True, max_length=self.max_length, return_attention_mask=False)
        return Tokens.from_lists([row or [self.tokenizer.pad_token_id] for row in ids["input_ids"]])
