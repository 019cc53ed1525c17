"""How a step of training becomes voltage pulses on the lines of an array."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from gpuxbar.spec.carry import Carry
from gpuxbar.spec.laws import ConstantStep, Ideal, LinearStep, UpdateLaw
from gpuxbar.spec.part import Part

__all__ = ["PulseTrain", "check_train"]


class PulseTrain(Part):
    """Coincidences of pulse trains on wordlines and bitlines move devices, each by one pulse of its law.

    For every sample, inputs x and errors d become trains of `length` slots; where both lines of a device have a pulse
    in a slot, it moves by one pulse, whose sign is that of -x d. With step_o the weight of one pulse of output o,
    e_o = rate d_o / step_o, and r the split between both sides, a slot holds a pulse with probability
    min(|x| r / sqrt(length), 1) or min(|e| / (r sqrt(length)), 1), so that -rate x d is the mean change of a device
    that makes its law's nominal steps (f = 1; with asymmetric ones, the mean of both ways).

    `scheme`: "stochastic" (independent slots) or "deterministic_implicit" (both probabilities are rounded to slots of
    the train, and round(length p q) coincidences happen for certain).
    `update_management`: r = sqrt(max|e| / max|x|) gives both sides the same largest probability; without it,
    r^2 = rate / step of the group's largest step.
    `bound_management`: a train is only ceil(max|x| max|e|) slots long, at most `length`. Where even that is too
    short, the errors are clipped under update management, not the inputs. This is aihwkit's `update_bl_management`; what
    Gokmen et al. 2017 call bound management keeps the outputs of reads within an ADC's range.
    `mode`: "exact" (samples in sequence, each moving every device) or "aggregated" (the same trains, counted over the
    batch; a device moves once, up and down). Both are alike where the order of pulses does not matter: for constant
    steps off the bounds of the window, and for any noiseless law with one-sided devices, which pulses only raise. Devices with
    `write_noise` that took pulses show it anew after the batch, as the last pulse would leave it.

    A sliced weight takes pulses on its lowest slice, and the others change by carries of scheme "periodic". A pulse there is a
    small step (see `ops.pulse_update`), and a sample makes at most `length` of them. The scheme "accumulate" is refused: it
    needs the digits of a product, and coincidences count the product out without making any. Its scheme "streamed", which
    drives lines with bits and digits instead, goes without pulse trains.
    Source: Gokmen and Vlasov, Frontiers in Neuroscience 2016; Gokmen, Onen and Haensch, ibid. 2017 (update management); Rasch et
    al., aihwkit, AICAS 2021 (lengths, implicit coincidences).
    """

    length: int = Field(31, ge=1, le=31)
    scheme: Literal["stochastic", "deterministic_implicit"] = "stochastic"
    update_management: bool = True
    bound_management: bool = True
    mode: Literal["exact", "aggregated"] = "exact"


def check_train(op: str, train: PulseTrain, law: UpdateLaw | None, carry: Carry | None = None) -> None:
    """Refuse a train that a law or slices cannot follow, or whose pulses may not be counted ahead."""
    if law is None or isinstance(law, Ideal):
        raise ValueError(
            f"{op}: `law` must be one with pulses to follow a pulse train, got {'none' if law is None else 'ideal'}; "
            "use law='constant_step'"
        )
    if carry is not None and carry.scheme != "periodic":
        raise ValueError(
            f"{op}: `carry.scheme` must be periodic with pulse trains, got {carry.scheme!r}: coincidences count a product out "
            "and cut no digits of it; choose it, or update without pulses"
        )
    if train.mode == "aggregated" and not (_constant(law) or (law.sides == "one_sided" and _noiseless(law))):
        raise ValueError(
            f"{op}: `mode` must be exact for law={law.law!r}, whose steps depend on the order of pulses, got 'aggregated'; "
            "use mode='exact', constant steps, or sides='one_sided' without noise of the cycle"
        )


def _constant(law: UpdateLaw) -> bool:
    if isinstance(law, LinearStep):
        return law.slope_up == law.slope_down == law.spread == 0
    return isinstance(law, ConstantStep)


def _noiseless(law: UpdateLaw) -> bool:
    return getattr(law, "cycle", 1.0) == 0 == getattr(law, "gamma", 0.0)
