"""Merging the weights of models of one architecture: state dicts, and folders as transformers writes them."""

from lit_core.merging.folders import merge_folders
from lit_core.merging.states import METHODS, merge

__all__ = ["METHODS", "merge", "merge_folders"]
