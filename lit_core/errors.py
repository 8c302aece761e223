"""The error for everything a user can put right: a flag, a file, a row."""

from pathlib import Path


class InputError(ValueError):
    """A mistake in the user's input, told in one line; the command line prints it and exits with code 2.

    Args:
        message: What is wrong and what to do about it.
        path: File or folder at fault.
        line: Line of the file, counted from 1.
        field: Name of the field in that line.
    """

    def __init__(
        self, message: str, path: Path | str | None = None, line: int | None = None, field: str | None = None
    ) -> None:
        if message.startswith("Caught InputError in"):  # by a loader's worker, whose traceback torch makes the message
            message = message.rpartition(f"{__name__}.InputError: ")[2].strip()
        self.message, self.field = message, field  # for who knows more of the place
        place = "" if path is None else str(path)
        if line is not None:
            place += f":{line}"
        if field is not None:
            place += f": field '{field}'" if place else f"field '{field}'"
        super().__init__(" ".join((f"{place}: {message}" if place else message).split("\n")))
