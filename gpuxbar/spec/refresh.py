"""When pairs of one-sided devices, which only gain conductance, are written anew."""

from __future__ import annotations

from pydantic import Field

from gpuxbar.spec.part import Part

__all__ = ["Refresh"]


class Refresh(Part):
    """Room for one-sided pairs: before they saturate, both devices are reset and their difference is programmed anew.

    `interval`: updates between two looks at the pairs of a layer, of which one comes just before an update; None: never. On a
    GPU a look at the count waits for the device. `above`: only weights of which a device shows more than this share of the
    window are written, and of these only those that then show less, so that it gains room: not where a weight is that large, or a
    device is stuck at `g_max` or has failed; aihwkit asks for a quarter in the other device instead. They are written as
    `spec.programming` says, with its noise; pulses of a refresh are not counted.

    Steps of phase-change memory are largest in low devices, so training on refreshed pairs bears lower rates only.
    Source: Nandakumar et al., Frontiers in Neuroscience 2020 (refresh of saturated pairs); Rasch et al., aihwkit, AICAS 2021.
    """

    interval: int | None = Field(None, ge=1, lt=2**31)
    above: float = Field(0.75, gt=0, le=1)
