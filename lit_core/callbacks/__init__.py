"""Callbacks for every method: they read what training logs and never change it."""

from lit_core.callbacks.curves import CurveRecorder
from lit_core.callbacks.throughput import CountsTokens, Throughput

__all__ = ["CountsTokens", "CurveRecorder", "Throughput"]
