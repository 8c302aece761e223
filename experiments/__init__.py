"""Experiments: one folder each, run as ``python -m experiments.<name>``."""
