"""How sliced weights are trained in situ: where a change goes, and how digits that outgrow their base move up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gpuxbar.spec.part import Part

__all__ = ["Carry"]


class Carry(Part):
    """Digits of a sliced weight that change where they are, and are put in order from time to time.

    With base b = 2**slice_bits, the pair of slice k holds a digit of digital weight b**k: a number, positive or negative,
    of units of which a full weight has b**slices - 1, so that digits of b - 1 make it. A device's window spans
    2**(slice_bits + headroom_bits) - 1 units, so that digits may outgrow their base between two carries; beyond the window
    they saturate.

    `scheme`: "accumulate": a wanted change is cut into signed digits, and every slice takes its own through its devices'
    law; what is below a unit goes to the lowest slice, whose devices are analog. "periodic": the lowest slice takes all
    of it, as far as its window goes, and the others only change by carries; so with pulse trains, which know no digits.

    A carry moves excess up, from the lowest slice to the highest: of a digit of b or more in size, whole multiples of b
    leave, and the next slice gains as many units. Digits keep what they have beyond whole units, so a carry changes no
    weight, but for the noise of its writes. Where the highest digit would be b or more in size, all digits become b - 1 of
    that sign: the weight is clipped. Cells are read exactly, one after the other, and written by the same write-verify as
    programmed weights, with the noise and spread of `spec.programming`. Only pairs whose digit changes are written, both
    devices of them; with one-sided devices those too of which both have gained a unit. A pair with a stuck or failed device
    neither gives nor takes.

    `interval`: updates between carries, which come just before the next update. "accumulate" carries through
    all slices at once; with "periodic", slice k gives up its excess every interval * b**k updates, as often as the slice
    below can have filled it.

    A weight takes 8 bytes a slice, and as many again where the law has write noise and where pulses are counted. A change
    is float32: it has 24 significant bits, whatever the slices hold.

    Source: Ankit et al., "PANTHER", IEEE Transactions on Computers 2020 (accumulate, headroom, carry resolution step); Agarwal
    et al., "Achieving ideal accuracies in analog neuromorphic computing using periodic carry", VLSI Technology 2017 (periodic).
    CrossSim V2 reads exactly, too, but moves all of a digit beyond a threshold, where here whole units of the next one move.
    """

    scheme: Literal["accumulate", "periodic"] = "accumulate"
    interval: int = Field(64, ge=1, lt=2**31)
    headroom_bits: int = Field(2, ge=1, le=8)

    def window(self, slice_bits: int) -> int:
        """Units over the window of a device."""
        return int(2 ** (slice_bits + self.headroom_bits)) - 1
