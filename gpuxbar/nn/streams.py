"""What a layer updated by products in its array keeps of a step: inputs and errors, instead of a weight gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, distributed

from gpuxbar.bridge.internals import _will_engine_execute_node

__all__ = ["Streams"]


class Streams:
    """Pairs of what a layer read and the gradient of what it gave, one for each backward pass, until its update."""

    def __init__(self) -> None:
        self.pairs: list[tuple[Tensor, Tensor]] = []
        self.group: Any = None  # of processes whose samples count together; None: this one's alone

    def watch(self, y: Tensor, weight: Tensor, x: Tensor) -> Tensor:
        """`y`, whose gradient will be kept beside `x` by backward passes that go on to `weight`, which gets none."""
        # a node to ask the engine about: of a parameter's own it does not tell where only that gradient is asked for
        mark = weight.view_as(weight)
        watched: Tensor = _Watch.apply(y, mark, x.detach(), self)  # type: ignore[no-untyped-call]
        return watched

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


class _Watch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, mark: Tensor, x: Tensor, streams: Streams) -> Tensor:
        ctx.save_for_backward(x)
        ctx.streams = streams
        ctx.mark_dirty(y)  # as if changed, not a view: what follows may work in place
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        (x,), (grad_y,) = ctx.saved_tensors, grads
        _, (mark, _), *_ = ctx.next_functions
        if _will_engine_execute_node(mark):
            ctx.streams.pairs.append((x, grad_y))
        return grad_y, None, None, None
