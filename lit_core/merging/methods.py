"""All ways to merge, by name, and their options from keywords."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from lit_core.errors import InputError
from lit_core.merging.dare import DareLinear, DareTies
from lit_core.merging.linear import Linear, TaskArithmetic
from lit_core.merging.method import Method
from lit_core.merging.model_stock import ModelStock
from lit_core.merging.sce import Sce
from lit_core.merging.spherical import Karcher, MultiSlerp, Slerp
from lit_core.merging.ties import Ties

_ALL = (Linear, Slerp, MultiSlerp, Karcher, TaskArithmetic, Ties, DareLinear, DareTies, Sce, ModelStock)
METHODS: dict[str, type[Method]] = {method.name: method for method in _ALL}


def method_of(name: str, options: Mapping[str, Any]) -> Method:
    """A method with its options.

    Raises:
        InputError: A name that is not known, an option that the method does not have, or a value out of its range.
    """
    if name not in METHODS:
        raise InputError(f"must be one of {', '.join(METHODS)}, got '{name}'", field="method")
    known = [field.name for field in fields(METHODS[name])]
    for option in options:
        if option not in known:
            has = f"has {', '.join(known)}" if known else "has no options"
            raise InputError(f"{name} does not know this option; it {has}", field=option)
    return METHODS[name](**options)
