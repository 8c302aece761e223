"""Reading preferences: rows with a preferred and another reply, as Anthropic's HH and TRL lay them out."""

from collections.abc import Iterable, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypedDict

from lit_core.errors import InputError
from lit_core.files import read_jsonl
from lit_core.progress import track

REPLY = "\n\nAssistant:"  # begins a reply in the dialogues of Anthropic's HH

Messages = list[dict[str, str]]
Dialogue = str | Messages


class PreferenceItem(TypedDict):
    """A pair of dialogues.

    ``chosen`` and ``rejected`` are whole dialogues, texts or messages with ``role`` and ``content``; ``margin`` says
    by how much the first should be better. ``opening`` is what the user said first: pairs that share it stay together
    when data are split.
    """

    id: str
    opening: str
    chosen: Dialogue
    rejected: Dialogue
    margin: float


def read_preferences(path: Path) -> list[PreferenceItem | None]:
    """Read a JSONL file, or all of those in a folder.

    Args:
        path: File or folder; rows as :func:`parse_preference` reads them.

    Returns:
        The pairs in order; None for a row whose two dialogues are the same.

    Raises:
        InputError: There is no such file, or a row is broken; one line naming file, line and field.
    """
    files = sorted(path.rglob("*.jsonl")) if path.is_dir() else [path]
    if not files:
        packed = any(path.rglob("*.jsonl.gz"))
        raise InputError("this folder has no .jsonl file" + ("; unpack its .jsonl.gz files" if packed else ""), path)
    found = []
    for file in files:
        name = (file.relative_to(path) if path.is_dir() else Path(file.name)).with_suffix("").as_posix()
        for line, row in track(read_jsonl(file), f"reading {file.name}", unit="row"):
            found.append(parse_preference(row, f"{name}:{line}", file, line))
    return found


def hub_preferences(name: str, split: str) -> list[PreferenceItem | None]:
    """Read a dataset of the Hugging Face hub; rows are counted from 1.

    Raises:
        InputError: There is no such dataset or split, or a row is broken.
    """
    import datasets

    try:
        rows: Iterable[Mapping[str, Any]] = datasets.load_dataset(name, split=split)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise InputError(
            f"must be 'built_in', a .jsonl file or a folder of them, and no Hugging Face dataset could be loaded "
            f"(split {split}): {error}",
            name,
        ) from None
    numbered = enumerate(track(rows, f"reading {name}", unit="row"), start=1)
    return [parse_preference(row, f"{name}:{number}", name, number) for number, row in numbered]


def parse_preference(row: Mapping[str, Any], pair_id: str, path: Path | str, line: int) -> PreferenceItem | None:
    """Turn a row into a pair.

    ``chosen`` and ``rejected`` are texts or lists of messages: whole dialogues, or replies to a field ``prompt``, to
    which they are appended as they stand. An optional ``margin`` is a number.

    Returns:
        The pair, or None where both dialogues are the same.

    Raises:
        InputError: A field is missing, empty or of another type.
    """
    sides = [_dialogue(row, field, path, line) for field in ("chosen", "rejected")]
    prompt = _dialogue(row, "prompt", path, line) if row.get("prompt") is not None else None
    if isinstance(sides[0], str) != isinstance(sides[1], str):
        raise InputError("must be a text where 'chosen' is one, and messages where it is not", path, line, "rejected")
    if prompt is not None and isinstance(sides[0], str) and not isinstance(prompt, str):
        raise InputError("must be a text where 'chosen' is one", path, line, "prompt")
    chosen, rejected = _with_prompt(prompt, sides)
    if chosen == rejected:
        return None
    margin = row.get("margin") or 0.0
    if not isinstance(margin, int | float) or isinstance(margin, bool) or not abs(margin) < float("inf"):
        raise InputError(f"must be a number, got {margin!r}", path, line, "margin")
    return PreferenceItem(
        id=pair_id, opening=_opening(prompt, chosen, rejected), chosen=chosen, rejected=rejected, margin=float(margin)
    )


def split_position(opening: str, seed: int) -> float:
    """A number from [0, 1) that depends on the opening and the seed alone, to split data by."""
    digest = blake2b(f"{seed}/{opening}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _with_prompt(prompt: Dialogue | None, sides: list[Dialogue]) -> list[Dialogue]:
    """Append replies to their prompt, unless they repeat it."""
    if prompt is None:
        return sides
    if isinstance(prompt, str):
        if isinstance(sides[0], str):
            return sides if all(str(side).startswith(prompt) for side in sides) else [f"{prompt}{s}" for s in sides]
        prompt = [{"role": "user", "content": prompt}]
    messages: list[Messages] = [side for side in sides if not isinstance(side, str)]
    whole = all(side[: len(prompt)] == prompt for side in messages)
    return [side if whole else prompt + side for side in messages]


def _opening(prompt: Dialogue | None, chosen: Dialogue, rejected: Dialogue) -> str:
    if not isinstance(chosen, str):
        said = [message["content"] for message in chosen if message["role"] == "user"]
        return (said or [chosen[0]["content"]])[0].strip()
    if isinstance(prompt, str):
        shared = prompt
    else:
        differs = (at for at, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other)
        shared = chosen[: next(differs, min(len(chosen), len(rejected)))]
        if REPLY not in shared:
            shared = shared[: max(shared.rfind(" "), shared.rfind("\n"), 0)]
    return shared.split(REPLY)[0].strip() or chosen.strip()


def _dialogue(row: Mapping[str, Any], field: str, path: Path | str, line: int) -> Dialogue:
    if field not in row:
        raise InputError(f"the field is missing; the row has: {', '.join(row) or 'nothing'}", path, line, field)
    value = row[field]
    if isinstance(value, str):
        return _text(value, path, line, field)
    if not isinstance(value, list):
        raise InputError(f"must be a text or a list of messages, got {type(value).__name__}", path, line, field)
    if not value:
        raise InputError("needs at least one message", path, line, field)
    messages = []
    for number, message in enumerate(value):
        place = f"{field}[{number}]"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError("a message has the fields 'role' and 'content'", path, line, place)
        messages.append({name: _text(message[name], path, line, f"{place}.{name}") for name in ("role", "content")})
    return messages


def _text(value: Any, path: Path | str, line: int, field: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"must be a text, got {type(value).__name__}", path, line, field)
    if not value.strip():
        raise InputError("is empty", path, line, field)
    try:
        value.encode()
    except UnicodeEncodeError:
        raise InputError("holds half of a surrogate pair, a broken \\u escape", path, line, field) from None
    return value
