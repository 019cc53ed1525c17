"""What researchers train with otherwise, where it is installed: other libraries on a case's settings, as far as they have them."""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from gpuxbar.spec import ConstantStep, PulseTrain, UpdateLaw

__all__ = ["Trained", "aihwkit_steps", "aihwkit_tile", "lightning_steps"]

TILE = 128
STEPS = 2**8 - 2  # of converters of 8 bits, as these libraries count them
NOISE = 0.02  # of reads, in the units of each

Trained = dict[str, tuple[nn.Module, torch.optim.Optimizer]]


def lightning_steps(model: nn.Module, rate: float) -> Trained:
    """The network in AIHWKIT-Lightning, and its optimiser: tiles of as many rows, 8-bit converters and noise of reads.

    Its tiles have any number of columns, and gradients pass them as if ideal.
    """
    if find_spec("aihwkit_lightning") is None:
        return {}
    config = import_module("aihwkit_lightning.simulator.configs").TorchInferenceRPUConfig()
    config.mapping.max_input_size = TILE
    config.forward.inp_res = config.forward.out_res = STEPS
    config.forward.out_bound, config.forward.out_noise = 10.0, NOISE
    config.pre_post.input_range.enable, config.pre_post.input_range.init_from_data = True, 0
    other = import_module("aihwkit_lightning.nn.conversion").convert_to_analog(model, config)
    return {"AIHWKIT-Lightning": (other, torch.optim.SGD(other.parameters(), rate))}


def aihwkit_steps(model: nn.Module, rate: float, law: UpdateLaw, train: PulseTrain) -> Trained:
    """The network in aihwkit, and its optimiser: 128 x 128 tiles read both ways by noisy 8-bit converters, updated by pulse trains.

    A weight is one device, and coincidences are not counted ahead.
    """
    if find_spec("aihwkit") is None:
        return {}
    configs = import_module("aihwkit.simulator.configs")
    config = _aihwkit_config(law, train)
    config.mapping = configs.MappingParameter(max_input_size=TILE, max_output_size=TILE)
    for reads in (config.forward, config.backward):
        reads.inp_res = reads.out_res = 1 / STEPS
        reads.out_noise, reads.bound_management = NOISE, configs.BoundManagementType.NONE
    other = import_module("aihwkit.nn.conversion").convert_to_analog(model, config)
    optimiser = import_module("aihwkit.optim").AnalogSGD(other.parameters(), rate)
    optimiser.regroup_param_groups(other)
    return {"aihwkit": (other, optimiser)}


def aihwkit_tile(law: UpdateLaw, train: PulseTrain, rate: float, outputs: int, inputs: int) -> Any:
    """A tile of aihwkit's with one device of the law a weight, where it is installed; `rate` in steps of the device."""
    if find_spec("aihwkit") is None:
        return None
    tile = import_module("aihwkit.simulator.tiles").AnalogTile(outputs, inputs, _aihwkit_config(law, train))
    tile.set_learning_rate(rate * _step(law))
    return tile


def _aihwkit_config(law: UpdateLaw, train: PulseTrain) -> Any:
    configs = import_module("aihwkit.simulator.configs")
    kind = configs.ConstantStepDevice if isinstance(law, ConstantStep) else configs.SoftBoundsDevice
    device = kind(
        dw_min=_step(law), dw_min_std=0.3, dw_min_dtod=0.3, up_down_dtod=0.01, w_max=1.0, w_min=-1.0, w_max_dtod=0.1,
        w_min_dtod=0.1,
    )  # fmt: skip
    pulses = configs.UpdateParameters(desired_bl=train.length, update_bl_management=train.bound_management)
    return configs.SingleRPUConfig(device=device, update=pulses)


def _step(law: UpdateLaw) -> float:
    """Of a device, whose window is from -1 to 1 there."""
    return 2 / (law.nominal_pulses or 1)
