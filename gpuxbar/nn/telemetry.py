"""What became of the arrays of a model: counts of reads and updates, and how far devices and wires are from trouble."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.models import crossbar_layers
from gpuxbar.nn.table import columns

__all__ = ["LayerState", "Telemetry", "telemetry"]


@dataclass(frozen=True)
class LayerState:
    """One crossbar layer.

    Attributes:
        layer: Its name in the model, before this was compiled or wrapped.
        state: "hardware-aware" (written at every change of its weight), "in situ" or "programmed".
        reads, updates: How often its arrays were read forwards, and updated in situ (its beginning, refreshes and steps of
            `spec.retention` count too).
        clipped: Share of the weights at or beyond the weight of a full pair; beside references, of those whose device is at an end
            of the window.
        saturation: Largest share of the window that a device trained in situ shows.
        worn: Share of the devices that have failed (`spec.endurance`).
        wire_error: Estimated relative error of the worst tile's conductances at the last read; 0 unless wires are anchored.
        age: Time since programming, s; 0 unless programmed.
    """

    layer: str
    state: str
    reads: int
    updates: int
    clipped: float
    saturation: float
    worn: float
    wire_error: float
    age: float


@dataclass(frozen=True)
class Telemetry:
    """Every crossbar layer of a model, `layers`, a `LayerState` each; printed as a table."""

    layers: tuple[LayerState, ...]

    def __repr__(self) -> str:
        head = ("layer", "state", "reads", "updates", "clipped", "saturation", "worn", "wire error", "age, s")
        return columns(
            head,
            [
                (
                    row.layer, row.state, str(row.reads), str(row.updates), f"{row.clipped:.2%}", f"{row.saturation:.0%}",
                    f"{row.worn:.2%}", f"{row.wire_error:.1e}", f"{row.age:g}",
                )
                for row in self.layers
            ],
        )  # fmt: skip


def telemetry(model: nn.Module) -> Telemetry:
    """Look at the arrays of a model, which it leaves as they are; on a GPU it waits for the device.

    Args:
        model: A converted model; layers that stay digital are left out.

    Raises:
        TypeError: `model` is no module.
        ValueError: A layer is on the meta device, where there is nothing to look at.
    """
    layers = crossbar_layers("telemetry", model)
    for name, layer in layers.items():
        if layer.weight.is_meta:
            raise ValueError(
                f"telemetry: `model` must hold its numbers, got {name or layer.name!r} on the meta device; load it first"
            )
    return Telemetry(tuple(_state(name or layer.name, layer) for name, layer in layers.items()))


def _state(name: str, layer: AnalogLayer) -> LayerState:
    return LayerState(
        layer=name,
        state="programmed" if layer.programmed else "in situ" if layer.in_situ else "hardware-aware",
        reads=layer.reads(),
        updates=0 if layer.update_step is None else int(layer.update_step),
        clipped=layer.clip_rate(),
        saturation=layer.saturation(),
        worn=layer.worn(),
        wire_error=layer.wire_error(),
        age=0.0 if layer.age is None else float(layer.age),
    )
