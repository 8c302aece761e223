"""Text generation from the weights in training."""

from lit_core.generation.engine import TorchEngine
from lit_core.generation.requests import Completion, Request
from lit_core.generation.sampling import SamplingParams

__all__ = ["Completion", "Request", "SamplingParams", "TorchEngine"]
