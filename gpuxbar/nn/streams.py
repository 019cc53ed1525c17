"""What a layer updated by products in its array keeps of a step: inputs and errors, instead of a weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from gpuxbar.bridge.lines import image_shape

__all__ = ["Streams"]


class Streams:
    """Pairs of what a layer read and the gradient of what it gave, one for each backward pass, until its update."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.group: Any = None  # of processes whose samples count together; None: this one's alone

    def taking(self, weight: Tensor) -> Tensor:
        """A weight for `bridge.analog_mvm`, whose backward passes, where they go on to it, leave operands here and no gradient."""
        # a node to ask the engine about: of a parameter's own it does not tell where only that gradient is asked for
        taken = weight.view(image_shape(weight.shape))
        taken.operands = self  # type: ignore[attr-defined]
        return taken

    def leave(self, x: Tensor, grad_y: Tensor) -> None:
        """Keep the pair of a backward pass."""
        self.pairs.append((x, grad_y))

    def take(self) -> list[tuple[Tensor, Tensor]]:
        """All pairs so far, of all processes of the group, which are forgotten."""
        pairs, self.pairs = self.pairs, []
        if self.group is None:
            return pairs
        ranks = distributed.get_world_size(self.group)
        return [(_of_all(x, self.group), _of_all(grad_y, self.group) / ranks) for x, grad_y in pairs]

    def forget(self) -> None:
        """Forget all pairs."""
        self.pairs = []

    def finite(self, weight: Tensor) -> Tensor:
        """A gradient of nothing for a weight, in whose place a `GradScaler` can look at the errors: one value in a sparse tensor,
        0, or NaN where an error of any process is not finite."""
        value = torch.zeros(1, device=weight.device)
        for _, grad_y in self.pairs:
            value += 0 * grad_y.abs().amax()
        if self.group is not None:
            distributed.all_reduce(value, group=self.group)
        at = torch.zeros(weight.dim(), 1, dtype=torch.int64, device=weight.device)
        value = value.to(weight.dtype)
        return torch.sparse_coo_tensor(
            at, value, weight.shape, device=weight.device, is_coalesced=True, check_invariants=False
        )

    def __getstate__(self) -> dict[str, Any]:
        return {"pairs": self.pairs, "group": None}  # a copied or saved layer is this process's alone


def _of_all(part: Tensor, group: Any) -> Tensor:
    """The parts of all processes one after another."""
    part = part.contiguous()
    parts = [torch.empty_like(part) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(parts, part, group=group)
    return torch.cat(parts)
