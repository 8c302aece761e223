"""CUDA graphs of decode steps: the hundreds of small kernels of a step start with one call.

A graph is a fixed list of kernels at fixed addresses, so that each shape of a step has one of its own, with inputs that
are copied to where it reads them. Sizes are rounded up for few shapes to occur.
"""

import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_core.backbones import text_model

CAPTURE_AT = 3  # use of a shape that is captured; see StepGraphs
MOST_GRAPHS = 32
DENSE_SIZES = 64  # sizes up to this one become powers of two, larger ones are off by a quarter at most


class Layout(NamedTuple):
    """What stays the same from step to step, of ``B`` rows of ``P`` prompts with ``n`` rows at most.

    Args:
        offsets: Tokens of each row's prompt, Long ``(B,)``.
        grid: Row and head at each place of ``(P, heads, n)``, flat.
        place: Where each of ``(B, heads)`` stands in the grid, flat.
        prompt_mask: Added to the scores of the prompts' tokens ``(P, 1, 1, L)``.
    """

    offsets: Tensor
    grid: Tensor
    place: Tensor
    prompt_mask: Tensor


Step = Callable[[Tensor, Tensor, Layout, int], Tensor]  # states, tokens held, layout, length -> states
Replay = Callable[[], Tensor]
Capture = Callable[[Replay], Replay]


class CudaCapture:
    """Records a call as a CUDA graph; all graphs share one memory pool, as none runs beside another.

    Args:
        device: Where the call works.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()

    def __call__(self, call: Replay) -> Replay:
        """Run a call once, so that kernels are loaded and the stream has its workspaces, and record it."""
        with torch.cuda.device(self.device):
            current, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
            self.stream.wait_stream(current)
            with torch.cuda.stream(self.stream):  # a capture that fails does not go back to the old stream by itself
                call()
                current.wait_stream(self.stream)
                # other threads (pinned memory of a loader, NCCL's watchdog) may go on meanwhile
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


class _Recorded(NamedTuple):
    """A graph, where it reads its inputs, and whose layout they have (the tensors that it was copied from)."""

    replay: Replay
    states: Tensor
    held: Tensor
    layout: Layout
    source: list[Layout]


class StepGraphs:
    """Graphs of one cache's decode steps, by shape; they die with it.

    They are not kept for the next call of the engine: optimisers change weights in place, but adapters are switched or
    merged and sharded weights gathered anew in between, and a graph would go on reading the old addresses. So a
    capture, which costs about as much as three steps (one to warm up, one to record, and building the graph), has to
    pay within one call: a shape is captured at its third use, since many pass by in a step or two.

    Args:
        capture: Records a call without arguments and returns what runs it again. The result is the same tensor each
            time, valid until the next run.
        most: Most graphs; the one that was not used for the longest time leaves.
    """

    def __init__(self, capture: Capture, most: int = MOST_GRAPHS) -> None:
        self.capture: Capture | None = capture
        self.most = most
        self.uses: Counter[Any] = Counter()
        self.recorded: OrderedDict[Any, _Recorded] = OrderedDict()

    def __call__(self, step: Step, states: Tensor, held: Tensor, layout: Layout, length: int) -> Tensor:
        """What ``step`` returns for the other arguments; an argument here, as keeping it would keep the cache alive.

        Args:
            step: Works on its tensors and on the cache alone: no number of theirs is looked at. Running it twice must
                do as much as once.
            states: Of each row ``(B, D)``.
            held: Response tokens of each row that the cache holds, Long ``(B,)``.
            layout: Copied only where it is another object than at the graph's last use.
            length: Read of the rows' caches.
        """
        key = length, states.shape, *(tensor.shape for tensor in layout)
        found = self.recorded.get(key) or self._record(key, step, states, held, layout, length)
        if found is None:
            return step(states, held, layout, length)
        self.recorded.move_to_end(key)
        found.states.copy_(states)
        found.held.copy_(held)
        if found.source[0] is not layout:
            for own, given in zip(found.layout, layout, strict=True):
                own.copy_(given)
            found.source[0] = layout
        return found.replay()

    def _record(
        self, key: Any, step: Step, states: Tensor, held: Tensor, layout: Layout, length: int
    ) -> _Recorded | None:
        """Capture a shape if its time has come."""
        self.uses[key] += 1
        if self.capture is None or self.uses[key] < CAPTURE_AT:
            return None
        own = states.clone(), held.clone(), Layout(*(tensor.clone() for tensor in layout))
        try:
            replay = self.capture(partial(step, *own, length))
        except RuntimeError as error:  # of CUDA, out of memory among them
            warnings.warn(f"decode steps go on without CUDA graphs, as a capture failed: {error}", stacklevel=2)
            self.capture = None
            self.recorded.clear()
            return None
        self.recorded[key] = _Recorded(replay, *own, [layout])
        if len(self.recorded) > self.most:  # after the capture, which has waited for the device: none is running
            oldest, _ = self.recorded.popitem(last=False)
            del self.uses[oldest]
        return self.recorded[key]


def rounded(size: int) -> int:
    """The size that a graph has for at least so many rows (or prompts, or rows a prompt)."""
    power = 1 << (size - 1).bit_length()
    step = power // 8
    return power if power <= DENSE_SIZES else -(-size // step) * step


def obstacle(model: nn.Module) -> str | None:
    """Say what about a causal language model's layers forbids to capture them; None if nothing does.

    Only what a decode step calls between embeddings and head counts, so hooks of the embeddings do not matter, nor does
    transformers' gradient checkpointing, which is off in evaluation mode.
    """
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import ActivationWrapper
    from torch.distributed.fsdp import FSDPModule

    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return "its weights are sharded, and gathered only for a time"
    inner = text_model(model)
    for name, module in nn.ModuleDict({"layers": inner.layers, "norm": inner.norm}).named_modules():
        if type(module).__module__.startswith("bitsandbytes."):
            return f"{name} is quantised"
        if isinstance(module, ActivationWrapper):
            return f"{name} is wrapped for activation checkpointing"
        if module._forward_hooks or module._forward_pre_hooks:
            return f"{name} has hooks"
        if "forward" in vars(module):
            return f"{name} has had its forward replaced"
    weights = [*inner.layers.parameters(), *inner.norm.parameters()]
    if odd := {type(weight).__name__ for weight in weights if type(weight) is not nn.Parameter}:
        return f"weights are {', '.join(sorted(odd))}"
    if len({weight.device for weight in weights}) > 1:
        return "its layers are on several devices"
    return None
