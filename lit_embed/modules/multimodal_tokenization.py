"""Items to rows of tokens and patches: prompts, image placeholders, bridge token, truncation that spares them."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from lit_core.errors import InputError
from lit_core.images import ImageSettings, Patches, patches
from lit_embed.items import ImageSource, Item, Kind
from lit_embed.modules.multimodal_tokens import MultimodalTokens, Row

Direction = Literal["bidirectional", "causal"]


@dataclass
class MultimodalConfig:
    """How items become vectors. What is left at None comes from an exported folder, if the backbone is one.

    Args:
        max_tokens: Most tokens of an item, an image's and the bridge token included; text is cut, an image never. By
            default what the tokenizer says, at most 4096 (CoCoA, card section 3).
        image_size: Stretch each image to a square of this side in pixels; 0 keeps its proportions, between the bounds.
            By default 0.
        min_pixels: An image that keeps its proportions is scaled up to this area; by default as the backbone says.
        max_pixels: An image that keeps its proportions is scaled down to this area; by default as the backbone says.
        attention: ``bidirectional`` (default), or ``causal`` as the backbone was made.
        normalize: Scale vectors to length 1; by default yes.
        dimensions: Keep the first values of each vector (matryoshka); by default all.
        query_prompt: Text put before each query's text, behind an image that comes first.
        passage_prompt: Text put before each passage's text, likewise.
        bridge: Token that ends each item and whose state is pooled; by default the tokenizer's end token.
        chunk_tokens: Padded tokens a forward pass takes at once; by default 512 on a CPU and 32,768 on a GPU.
        skip_unreadable: Leave out items whose image cannot be read, with a warning, instead of an error.
    """

    max_tokens: int | None = None
    image_size: int | None = None
    min_pixels: int | None = None
    max_pixels: int | None = None
    attention: Direction | None = None
    normalize: bool | None = None
    dimensions: int | None = None
    query_prompt: str | None = None
    passage_prompt: str | None = None
    bridge: str | None = None
    chunk_tokens: int | None = None
    skip_unreadable: bool = False

    def __post_init__(self) -> None:
        for name in ("max_tokens", "min_pixels", "max_pixels", "dimensions", "chunk_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} must be at least 1, got {value}")
        if self.image_size is not None and self.image_size < 0:
            raise InputError(f"image_size must be at least 0, got {self.image_size}")
        if self.attention not in (None, *get_args(Direction)):
            raise InputError(f"attention must be {' or '.join(get_args(Direction))}, got '{self.attention}'")


@dataclass(frozen=True)
class VisionTokens:
    """Ids that stand around and for an image.

    Args:
        start: Opens an image.
        end: Closes it.
        image: Stands for one token of it.
        video: Stands for one token of a video, which no item has.
    """

    start: int
    end: int
    image: int
    video: int


class MultimodalTokenizer:
    """Prepares items; picklable, so that loader workers can hold it.

    A row is ``[before] <|vision_start|> <|image_pad|>... <|vision_end|> [behind] bridge``, and ``[text] bridge`` for an
    item without an image.

    Args:
        tokenizer: A fast tokenizer.
        config: With nothing left open but the bounds on an image's area.
        images: How images are prepared.
        vision: Special ids.

    Raises:
        InputError: The bridge token does not exist or is the padding token, or a size does not fit.
    """

    def __init__(self, tokenizer: Any, config: MultimodalConfig, images: ImageSettings, vision: VisionTokens) -> None:
        self.tokenizer, self.config, self.vision = tokenizer, config, vision
        self.images = images.bounded(config.min_pixels, config.max_pixels)
        self.prompts = {"query": config.query_prompt or "", "passage": config.passage_prompt or ""}
        self.bridge_id = _bridge(tokenizer, config.bridge)
        self.check_special(self.bridge_id, "bridge")
        if config.image_size and config.image_size % images.factor:
            raise InputError(f"image_size must be a multiple of {images.factor} pixels, got {config.image_size}")
        assert config.max_tokens is not None  # build_multimodal_encoder has settled it
        self.max_tokens = config.max_tokens
        self._said = False

    def __call__(self, items: Sequence[Item], kind: Kind) -> MultimodalTokens:
        """Tokens and patches of items; those with an unreadable image are left out where the settings allow it.

        Warns once if texts are cut.

        Raises:
            InputError: As :meth:`rows`.
        """
        rows = [row for row in self.rows(items, kind) if row is not None]
        self.say_cut(sum(row.cut for row in rows), len(rows))
        return self.pack(rows)

    def pack(self, rows: Sequence[Row]) -> MultimodalTokens:
        """Rows as a batch."""
        return MultimodalTokens.from_rows(rows, self.images.merge)

    def rows(self, items: Sequence[Item], kind: Kind, reserved: Sequence[int] = ()) -> list[Row | None]:
        """One row an item; None for an image that cannot be read, where the settings allow it.

        Args:
            items: The items.
            kind: Chooses the prompt.
            reserved: Tokens that each row should leave free within the limit, as far as cutting text can do it.

        Raises:
            InputError: An image cannot be read or has too many tokens, or a text holds a special token of images.
        """
        read: dict[str, Patches | None] = {}
        for item in items:
            if item.image is not None and item.image.key not in read:
                read[item.image.key] = self._read(item.image)
        texts = [self._texts(item, kind) for item in items]
        flat = [text for pair in texts for text in pair]
        ids = self.tokenizer(flat, add_special_tokens=False, return_attention_mask=False)["input_ids"] if flat else []
        found: list[Row | None] = []
        for number, item in enumerate(items):
            before, behind = ids[2 * number], ids[2 * number + 1]
            self.check_text(item.text, before + behind)
            spare = reserved[number] if reserved else 0
            if item.image is None:
                found.append(self._row(before + behind, [], None, spare))
            else:
                image = read[item.image.key]
                found.append(None if image is None else self._row(before, behind, image, spare))
        return found

    def check_text(self, text: str, ids: Sequence[int]) -> None:
        """Refuse a text whose tokens would be taken for those of an image.

        Raises:
            InputError: It holds a special token of images.
        """
        vision = self.vision
        wrong = {vision.start, vision.end, vision.image, vision.video}.intersection(ids)
        if wrong:
            token = self.tokenizer.convert_ids_to_tokens(min(wrong))
            raise InputError(f"the text {text[:40]!r} holds {token}, which only an image may bring")

    def check_special(self, token: int, field: str) -> None:
        """Refuse a token that stands for an image, or around it, in another place.

        Raises:
            InputError: It is one of those.
        """
        vision = self.vision
        if token in (vision.start, vision.end, vision.image, vision.video):
            name = self.tokenizer.convert_ids_to_tokens(token)
            raise InputError(f"must not be {name}, which belongs to images", field=field)

    def say_cut(self, cut: int, total: int) -> None:
        """Warn of cut texts, once for this tokenizer."""
        if cut and not self._said:
            self._said = True
            warnings.warn(f"{cut} of {total} texts were cut to keep within {self.max_tokens} tokens", stacklevel=3)

    def _texts(self, item: Item, kind: Kind) -> tuple[str, str]:
        """Text in front of the image and behind it, with the prompt before whichever comes first."""
        before, behind = item.parts()
        prompt = self.prompts[kind]
        return (prompt + before, behind) if before.strip() else (before, prompt + behind)

    def _read(self, source: ImageSource) -> Patches | None:
        try:
            image = source.load()
        except InputError as error:
            if not self.config.skip_unreadable:
                raise
            warnings.warn(f"left out: {error}", stacklevel=2)
            return None
        try:
            found = patches(image, self.images, self.config.image_size)
        except InputError as error:
            raise InputError(error.message, source.key) from None
        needed = self._count(found) + 3
        if needed > self.max_tokens:
            raise InputError(
                f"its {needed - 3} tokens, their two marks and the end make {needed}, more than max_tokens "
                f"{self.max_tokens}; lower image_size or max_pixels",
                source.key,
            )
        return found

    def _count(self, image: Patches) -> int:
        return len(image.pixels) // self.images.merge**2

    def _row(self, before: list[int], behind: list[int], image: Patches | None, reserved: int = 0) -> Row:
        placed: list[int] = []
        if image is not None:
            placed = [self.vision.start, *[self.vision.image] * self._count(image), self.vision.end]
        room = max(0, self.max_tokens - len(placed) - 1 - reserved)
        cut = len(before) + len(behind) > room
        before = before[:room]
        behind = behind[: room - len(before)]
        ids = [*before, *placed, *behind, self.bridge_id]
        return Row(ids, len(ids) - 1, image, len(before) + 1 if placed else 0, cut)


def _bridge(tokenizer: Any, token: str | None) -> int:
    known = tokenizer.eos_token_id if token is None else tokenizer.get_vocab().get(token)
    if known is None:
        raise InputError(f"the bridge token {token or '(eos)'} is not in the tokenizer", field="bridge")
    if known == tokenizer.pad_token_id:
        raise InputError(
            f"the bridge token must differ from the padding token {tokenizer.pad_token}; name another one",
            field="bridge",
        )
    return known
