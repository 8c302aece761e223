"""Merging the weights of models of one architecture: state dicts, folders as transformers writes them, adapters."""

from lit_core.merging.adapters import merge_adapters
from lit_core.merging.drift_report import Drift, drift, drift_figure
from lit_core.merging.folders import merge_folders
from lit_core.merging.methods import METHODS
from lit_core.merging.states import merge

__all__ = ["METHODS", "Drift", "drift", "drift_figure", "merge", "merge_adapters", "merge_folders"]
