"""How sliced weights are trained in situ: where a change goes, and how digits that outgrow their base move up."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from gpuxbar.spec.part import Part

__all__ = ["Carry"]


class Carry(Part):
    """Digits of a sliced weight that change where they are, and are put in order from time to time.

    With base b = 2**slice_bits, the pair of slice k holds a digit of digital weight b**k: a number, positive or negative,
    of units of which a full weight has b**slices - 1, so that digits of b - 1 make it. A device's window spans
    2**(slice_bits + headroom_bits) - 1 units, so that digits may outgrow their base between two carries; beyond the window
    they saturate. Digits of asymmetric devices come to rest where steps up and down balance: short of their base they never carry,
    and what asks for more is lost. More headroom puts the base nearer to the middle of the window, where steps are alike.

    `scheme`: "accumulate": a wanted change, of at most a full weight, is cut into signed digits, and every slice takes its own
    through its devices' law; what is below a unit goes to the lowest slice, whose devices are analog. "periodic": the lowest slice
    takes all of it, as far as its window goes, and the others only change by carries; so with pulse trains, which know no digits.
    "streamed": nobody forms the wanted change. For every sample, the bits of the inputs' codes drive wordlines one after the other,
    and bitlines are driven with the digits of what each bit asks for (see `ops.streamed_update`): slices gather sums of digits,
    where "accumulate" gives them the digits of the sum, so they outgrow their base and saturate sooner, and more of them are
    written. Layers keep inputs and errors of their backward passes and make no weight gradient. A change that is given whole, as to
    `device_update`, is cut as by "accumulate".

    A carry moves excess up, from the lowest slice to the highest: of a digit of b or more in size, whole multiples of b
    leave, and the next slice gains as many units. Digits keep what they have beyond whole units, so a carry changes no
    weight, but for the noise of its writes. Where the highest digit would be b or more in size, all digits become b - 1 of
    that sign: the weight is clipped. Cells are read exactly, one after the other, and written by the same write-verify as
    programmed weights, with the noise and spread of `spec.programming`. Only pairs whose digit changes are written, both
    devices of them; with one-sided devices those too of which both have gained a unit. A pair with a stuck or failed device
    neither gives nor takes nor is written, so that its other device can make up for it; a weight whose highest pair is such is
    not clipped.

    `input_bits`: bits of the magnitude of an input's code, with "streamed"; a sign comes with it.
    `interval`: updates between carries, which come just before the next update. "accumulate" and "streamed" carry through
    all slices at once; with "periodic", slice k gives up its excess every interval * b**k updates, as often as the slice
    below can have filled it.

    A weight takes 8 bytes a slice, and as many again where the law has write noise and where pulses are counted. A change
    is float32: it has 24 significant bits, whatever the slices hold.

    Source: Ankit et al., "PANTHER", IEEE Transactions on Computers 2020 (accumulate, headroom, carry resolution step); Agarwal
    et al., "Achieving ideal accuracies in analog neuromorphic computing using periodic carry", VLSI Technology 2017 (periodic).
    The bits, signs and digits of "streamed" are this library's formulation of outer products in slices, PANTHER's idea.
    CrossSim V2 reads exactly, too, but moves all of a digit beyond a threshold, where here whole units of the next one move.
    """

    scheme: Literal["accumulate", "periodic", "streamed"] = "accumulate"
    input_bits: int = Field(8, ge=1, le=8)
    interval: int = Field(64, ge=1, lt=2**31)
    headroom_bits: int = Field(2, ge=1, le=8)

    @model_validator(mode="after")
    def _streamed(self) -> Carry:
        if self.scheme != "streamed" and self.input_bits != 8:
            raise ValueError(
                f"Carry: `input_bits` must be left out without scheme='streamed', got {self.input_bits} for {self.scheme!r}; "
                "only there inputs go bit by bit"
            )
        return self

    def window(self, slice_bits: int) -> int:
        """Units over the window of a device."""
        return int(2 ** (slice_bits + self.headroom_bits)) - 1
