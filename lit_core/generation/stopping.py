"""Stop strings: texts that end a response."""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

SPARE_TOKENS = 4  # decoded before the longest stop string could begin, so that no character is cut
REPLACEMENT = "\ufffd"  # what a part of a character decodes to


class StopStrings:
    """Finds responses whose newest token completes a stop string.

    Only tokens that contain the last character of one can complete it; the others cost a lookup and no decoding.

    Args:
        strings: The stop strings.
        tokenizer: Decodes tokens.
        vocabulary: Rows of the model's head.
    """

    def __init__(self, strings: Sequence[str], tokenizer: Any, vocabulary: int) -> None:
        self.strings, self.tokenizer = tuple(strings), tokenizer
        self.window = max(len(string.encode()) for string in strings) + SPARE_TOKENS
        last = {string[-1] for string in strings}
        parts = any(ord(character) > 127 for character in last)
        before = tokenizer.encode("a", add_special_tokens=False)  # decoders strip blanks at a text's start
        length = self._settled(before)
        rows = [[*before, token] for token in range(min(vocabulary, len(tokenizer)))]
        texts = [text[length:] for text in tokenizer.batch_decode(rows)]
        self.could_end = torch.zeros(vocabulary, dtype=torch.bool)
        self.could_end[: len(texts)] = torch.tensor(
            [bool(last & set(text)) or (parts and REPLACEMENT in text) for text in texts]
        )

    def candidates(self, tokens: Tensor) -> list[int]:
        """Rows whose newest token (Long ``(B,)``) may complete a stop string."""
        return self.could_end[tokens.cpu()].nonzero().squeeze(1).tolist()

    def completed(self, tokens: Sequence[int], prompt: int) -> bool:
        """Whether the newest token completes a stop string, or has one within it.

        Args:
            tokens: A prompt and its response.
            prompt: Tokens of the prompt; they say how the response's text begins, but no stop string lies in them.
        """
        recent = tokens[-self.window :]
        text = self.tokenizer.decode(recent)
        begin = self._settled(recent[: max(0, prompt - len(tokens) + len(recent))])
        before = self._settled(recent[:-1])
        return any(text.find(string, max(begin, before + 1 - len(string))) >= 0 for string in self.strings)

    def _settled(self, tokens: Sequence[int]) -> int:
        """Characters that stay as they are when more tokens follow."""
        return len(self.tokenizer.decode(tokens).rstrip(REPLACEMENT))


@lru_cache(maxsize=8)
def stop_strings(strings: tuple[str, ...], tokenizer: Any, vocabulary: int) -> StopStrings:
    """The same object for the same arguments, as looking through a vocabulary takes time."""
    return StopStrings(strings, tokenizer, vocabulary)
