"""Rows that name texts and images, from JSONL, JSON lists, parquet and other files; mistakes name file, line and field.

An empty string and ``null`` both mean that there is no text or no image.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_core.datasets import FILE_TYPES, load_rows
from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track
from lit_embed.data.beir import string_field
from lit_embed.items import ImageFile, Item

SUFFIXES = tuple(FILE_TYPES)


class ImageFolder:
    """Images below a folder; each file is looked for once, and has one object however often it is named.

    Args:
        root: The folder that paths in rows are relative to.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        self._found: dict[str, ImageFile | None] = {}

    def find(self, path: str) -> ImageFile | None:
        """The image, or None where there is no such file; it is not opened."""
        if path not in self._found:
            place = self.root / path
            self._found[path] = ImageFile(place) if place.is_file() else None
        return self._found[path]


@dataclass(frozen=True)
class Row:
    """A row and where it comes from.

    Args:
        values: Its fields.
        path: Its file.
        line: Its line, or its number in a file without lines, counted from 1.
        images: Where its images are.
    """

    values: dict[str, Any]
    path: Path
    line: int
    images: ImageFolder

    def error(self, message: str, field: str) -> InputError:
        """An error about one of its fields."""
        return InputError(message, self.path, self.line, field)

    def text(self, field: str) -> str:
        """A field's text without the white space around it, empty where there is none.

        Raises:
            InputError: There is no such field, or it is no string.
        """
        if field in self.values and self.values[field] is None:
            return ""
        return string_field(self.values, field, self.path, self.line).strip()

    def item(self, text_field: str, image_field: str) -> Item:
        """The item that two fields make.

        Raises:
            InputError: A field is missing or of another type, there is no such image, neither has anything, or the
                text has a marker and there is no image, or two.
        """
        return self.make_item(self.text(text_field), self.text(image_field), text_field, image_field)

    def make_item(self, text: str, image: str, text_field: str, image_field: str, which: str = "") -> Item:
        """The item of a text and an image's path; ``which`` begins the message of an error. Raises: see ``item``."""
        found = self.images.find(image) if image else None
        if image and found is None:
            raise self.error(f"{which}no such image: {self.images.root / image}", image_field)
        try:
            return Item(text, found)
        except InputError as error:
            raise self.error(f"{which}{error.message}", text_field) from None


def read_rows(path: Path, images: ImageFolder) -> Iterator[Row]:
    """Read the rows of a data file, one after the other.

    Raises:
        InputError: The file is missing, of an unknown type or broken.
    """
    if not path.is_file():
        raise InputError("file not found", path)
    if path.suffix == ".jsonl":
        numbered: Iterator[tuple[int, dict[str, Any]]] = read_jsonl(path)
    elif path.suffix == ".json":
        numbered = _read_json_list(path)
    elif path.suffix in SUFFIXES:
        numbered = enumerate(load_rows(str(path)), start=1)
    else:
        raise InputError(f"rows are read from {', '.join(sorted(SUFFIXES))} files", path)
    for line, values in track(numbered, f"reading {path.name}", unit="row"):
        yield Row(values, path, line, images)


def _read_json_list(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield each object of a JSON list with the line that it begins in."""
    decoder, space = json.JSONDecoder(), re.compile(r"\s*")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"not valid UTF-8 ({error})", path) from None

    def skip(position: int) -> int:
        found = space.match(text, position)
        return found.end() if found else position

    position, line, counted = skip(0), 1, 0
    if text[position : position + 1] != "[":
        raise InputError("expected a JSON list of rows", path, 1)
    position = skip(position + 1)
    while text[position : position + 1] != "]":
        line += text.count("\n", counted, position)
        counted = position
        try:
            row, position = decoder.raw_decode(text, position)
        except json.JSONDecodeError as error:
            raise InputError(f"not valid JSON ({error})", path, error.lineno) from None
        if not isinstance(row, dict):
            raise InputError(f"expected a JSON object, got {type(row).__name__}", path, line)
        yield line, row
        position = skip(position)
        if text[position : position + 1] == ",":
            position = skip(position + 1)
        elif text[position : position + 1] != "]":
            line += text.count("\n", counted, position)
            raise InputError("not valid JSON (expected a comma or the end of the list)", path, line)
