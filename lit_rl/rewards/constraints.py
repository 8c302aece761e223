"""Constraints in few words, for models of a few thousand parameters; the checks are those of ``instructions``."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from lit_core.errors import InputError
from lit_rl.rewards.instructions import check_instructions

Arguments = Mapping[str, Any]
CLAUSES: dict[str, Callable[[Arguments], str]] = {  # quick checks only: they run in the training process
    "keywords:existence": lambda given: f"with {' and '.join(given['keywords'])}",
    "keywords:forbidden_words": lambda given: f"not {' and '.join(given['forbidden_words'])}",
    "length_constraints:number_words": lambda given: f"{given['relation']} {given['num_words']} words",
    "punctuation:no_comma": lambda given: "no comma",
}


def constraints_prompt(instruction_ids: Sequence[str], kwargs: Sequence[Arguments]) -> str:
    """The constraints as one line, such as ``with sea, less than 6 words, no comma:``.

    Args:
        instruction_ids: Keys of ``CLAUSES``, at least one.
        kwargs: Arguments of each check.

    Raises:
        InputError: None or an unknown id, or an argument that is missing or of another type.
    """
    unknown = [name for name in instruction_ids if name not in CLAUSES]
    if unknown or not instruction_ids:
        raise InputError(
            f"takes some of {', '.join(CLAUSES)}, got {unknown[0] if unknown else 'none'}", field="instruction_id_list"
        )
    check_instructions("", instruction_ids, kwargs)
    return ", ".join(CLAUSES[name](given) for name, given in zip(instruction_ids, kwargs, strict=True)) + ":"
