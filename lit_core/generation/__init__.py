"""Text generation from the weights in training."""

from lit_core.generation.engine import TorchEngine
from lit_core.generation.growth import Branch, Planner, Response
from lit_core.generation.requests import Completion, Request
from lit_core.generation.sampling import SamplingParams

__all__ = ["Branch", "Completion", "Planner", "Request", "Response", "SamplingParams", "TorchEngine"]
