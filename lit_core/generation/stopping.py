"""Stop strings: texts that end a response."""

from collections.abc import Sequence
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
        texts = tokenizer.batch_decode([[token] for token in range(min(vocabulary, len(tokenizer)))])
        could = [bool(last & set(text)) or (parts and REPLACEMENT in text) for text in texts]
        if any(character.isspace() for character in last):  # decoders strip blanks at a text's ends
            could = [found or not text.strip() for found, text in zip(could, texts, strict=True)]
        self.could_end = torch.zeros(vocabulary, dtype=torch.bool)
        self.could_end[: len(could)] = torch.tensor(could)

    def candidates(self, tokens: Tensor) -> list[int]:
        """Rows whose newest token (Long ``(B,)``) may complete a stop string."""
        return self.could_end[tokens.cpu()].nonzero().squeeze(1).tolist()

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether a response ends with, or has in its newest token, a stop string."""
        text = self.tokenizer.decode(tokens[-self.window :], skip_special_tokens=False)
        return any(string in text for string in self.strings)
