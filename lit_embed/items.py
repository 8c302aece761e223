"""What a multimodal encoder reads: a text, an image, or an image and a text."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol

from lit_core.errors import InputError

if TYPE_CHECKING:
    from PIL.Image import Image

Kind = Literal["query", "passage"]  # what a text or an item is, which chooses its prompt
MARKER = "<|image_1|>"  # stands in a text where its image belongs, as MMEB's rows have it


class ImageSource(Protocol):
    """An image that is made or read when it is needed."""

    @property
    def key(self) -> str:
        """Equal for equal images."""
        ...

    def load(self) -> "Image":
        """The image in RGB.

        Raises:
            InputError: It cannot be read; the error names it.
        """
        ...


@dataclass(frozen=True)
class ImageFile:
    """An image in a file.

    Args:
        path: Of any format that Pillow reads.
    """

    path: Path

    @property
    def key(self) -> str:
        return str(self.path)

    def load(self) -> "Image":
        from PIL import Image, UnidentifiedImageError

        try:
            with Image.open(self.path) as image:
                return image.convert("RGB")
        except FileNotFoundError:
            raise InputError("no such image", self.path) from None
        except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise InputError(f"cannot be read as an image ({error})", self.path) from None


@dataclass(frozen=True)
class Item:
    """One thing to embed.

    Args:
        text: May hold ``MARKER`` once, where the image belongs; the image comes first without it.
        image: The image, if any.

    Raises:
        InputError: Neither text nor image, a marker without an image, or two markers.
    """

    text: str = ""
    image: ImageSource | None = None

    def __post_init__(self) -> None:
        if not self.text.strip() and self.image is None:
            raise InputError("has neither a text nor an image")
        if MARKER in self.text and self.image is None:
            raise InputError(f"has {MARKER} in its text, but no image")
        if self.text.count(MARKER) > 1:
            raise InputError(f"has {MARKER} {self.text.count(MARKER)} times, for one image")

    @property
    def key(self) -> tuple[str, str]:
        """Equal for items that are the same to an encoder."""
        return self.text, "" if self.image is None else self.image.key

    def parts(self) -> tuple[str, str]:
        """Text before and behind the image; all of it is behind where there is no marker."""
        before, found, behind = self.text.partition(MARKER)
        return (before, behind) if found else ("", self.text)
