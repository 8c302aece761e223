"""Merging the weights of models of one architecture: state dicts, folders as transformers writes them, adapters."""

from lit_core.merging.folders import merge_folders
from lit_core.merging.methods import METHODS
from lit_core.merging.states import merge

__all__ = ["METHODS", "merge", "merge_folders"]
