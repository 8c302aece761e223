"""Forward passes over all rows of a batch, a chunk at a time, without gradients."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lit_rl.modules.experience import Experience
from lit_rl.modules.exploration import Exploration, Selection
from lit_rl.modules.layout import Chunk, Layout, Sequences
from lit_rl.modules.policy import Policy

CPU_TOKENS, GPU_TOKENS = 2048, 16384


class Passes:
    """Cuts rows into chunks, and puts what is computed of them together again.

    Args:
        policy: Reads the chunks.
        micro_tokens: Tokens of a chunk, padding counted; None takes 2,048 on a CPU and 16,384 on a GPU.
        layout: Of the chunks.
        equal: Whether every rank makes equally many chunks.
    """

    def __init__(self, policy: Policy, micro_tokens: int | None, layout: Layout, equal: bool) -> None:
        self.policy, self.micro_tokens, self.equal = policy, micro_tokens, equal
        self.layout: Layout = layout if policy.shares_prompts else "sorted"

    def chunks(
        self, sequences: Sequences, rows: Sequence[int], device: torch.device, spare: int | None = None
    ) -> list[Chunk]:
        """Chunks of some rows; ``spare`` is the row of idle chunks where this rank has none and others have some."""
        budget = self.micro_tokens or (CPU_TOKENS if device.type == "cpu" else GPU_TOKENS)
        return sequences.chunks(rows, budget, device, self.layout, self.equal, spare)

    @torch.no_grad()
    def by_token(
        self, sequences: Sequences, responses: Tensor, mask: Tensor, compute: Callable[[Chunk, Tensor], Tensor]
    ) -> Tensor:
        """``compute(chunk, targets) -> (N,)`` of all rows, each number at its token: float32 ``(B, T)``."""
        found = torch.zeros(mask.shape, device=mask.device)
        for chunk in self.chunks(sequences, range(len(mask)), mask.device):
            index = torch.tensor(chunk.rows, dtype=torch.long, device=mask.device)
            part = torch.zeros(len(index), mask.shape[1], device=mask.device)
            part[mask[index]] = compute(chunk, responses[index][mask[index]])
            found[index] = part
        return found

    def log_probs(self, sequences: Sequences, responses: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities under the present weights ``(B, T)``."""

        def compute(chunk: Chunk, targets: Tensor) -> Tensor:
            return self.policy.log_probs(self.policy.states(chunk), targets, nodes=chunk.nodes).log_probs

        return self.by_token(sequences, responses, mask, compute)

    def reference_log_probs(self, sequences: Sequences, responses: Tensor, mask: Tensor) -> Tensor:
        """Log-probabilities under the frozen weights ``(B, T)``."""
        return self.by_token(sequences, responses, mask, self.policy.reference_log_probs)

    @torch.no_grad()
    def select(self, term: Exploration, experience: Experience, rows: list[int], seed: int) -> Selection:
        """Tokens that an exploration term chooses over a whole mini-batch, under the present weights."""
        device = experience.mask.device
        mask = torch.zeros_like(experience.mask)
        mask[torch.tensor(rows, device=device)] = experience.mask[torch.tensor(rows, device=device)]
        log_probs, entropies = (torch.zeros_like(experience.old_log_probs) for _ in range(2))
        for chunk in self.chunks(experience.sequences, rows, device):
            index = torch.tensor(chunk.rows, dtype=torch.long, device=device)
            kept = experience.mask[index]
            targets = experience.responses[index][kept]
            found = self.policy.log_probs(self.policy.states(chunk), targets, term.needs_entropy, nodes=chunk.nodes)
            for whole, values in ((log_probs, found.log_probs), (entropies, found.entropy)):
                if values is not None:
                    part = torch.zeros(kept.shape, device=device)
                    part[kept] = values
                    whole[index] = part
        return term.select(log_probs, entropies, experience.advantages, mask, seed)
