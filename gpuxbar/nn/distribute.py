"""Data-parallel training: every process holds the same arrays and reads its part of a batch."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import distributed, nn
from torch.nn.parallel import DistributedDataParallel

from gpuxbar.bridge.internals import _verify_param_shape_across_processes
from gpuxbar.nn.analog_layer import AnalogLayer
from gpuxbar.nn.models import require_apart, require_module, require_whole

__all__ = ["distribute"]


def distribute(model: nn.Module, *, wrap: bool = True, **options: Any) -> nn.Module:
    """A converted model under `DistributedDataParallel`, trained as one process would with the batches of all ranks as one.

    Each rank's reads draw the noise of its own rows of that batch. Updates of devices are the same everywhere: for pulse
    trains and bit streams the ranks exchange what they read and its errors, averaged as gradients are. Conductances that
    follow from weights are not sent. Batches must be of one size on all ranks. ADC ranges are those that rank 0 calibrated.
    What is not as in one process: DAC ranges "tensor" and "ema" are those of a rank's own part, and layers whose inputs count
    other things before samples, as sequence-first transformers and packed sequences of other lengths on each rank, draw noise
    of other rows, though no two ranks the same. Layers refuse to train without this under `DistributedDataParallel` and FSDP,
    and warn where other processes of torch.distributed run, which may share batches with this one or not.

    Args:
        model: With its layers on their device; build the optimiser from its parameters.
        wrap: False returns the model itself, for a framework that wraps it: Lightning (call this on the LightningModule, in its
            `setup`), accelerate and transformers' Trainer; or for `fully_shard`, which shards parameters alone: every rank holds
            all conductances, and layers are calibrated before it and cannot be trained in situ. What such a model is only a part of
            sends derived conductances too.
        options: Of `DistributedDataParallel`; without it, `process_group` alone.

    Raises:
        TypeError: `model` is no module, or options are given with nothing to wrap by.
        ValueError: torch.distributed is not initialised, or the model is sharded already.
    """
    if not wrap and options.keys() - {"process_group"}:
        raise TypeError(
            f"distribute: options must be given to what wraps the model with wrap=False, got {', '.join(options)}; leave them out"
        )
    require_module("distribute", model)
    if not distributed.is_available() or not distributed.is_initialized():
        raise ValueError(
            "distribute: torch.distributed must be initialised, got no process group; call "
            "torch.distributed.init_process_group, as torchrun's scripts do"
        )
    require_whole("distribute", model)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, AnalogLayer)}
    require_apart("distribute", layers.values())
    group = options.get("process_group") or distributed.group.WORLD
    assert group is not None
    held = [layer for layer in layers.values() if layer.is_held()]
    derived = []
    for name, layer in layers.items():
        layer.set_plan(replace(layer.plan, rank=distributed.get_rank(group)))
        layer.streams.group = group
        prefix = f"{name}." if name else ""
        derived += [prefix + buffer for buffer in layer._non_persistent_buffers_set]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, derived)
    made = DistributedDataParallel(model, **options) if wrap else _made_alike(model, group, derived)
    for layer in layers.values():  # all have rank 0's weights, devices and ranges now
        layer.look_at_ranges()
        layer.look_at_seed()
        layer.forget_wires()
    for layer in held:
        layer.hold_on()
    return made


def _made_alike(model: nn.Module, group: distributed.ProcessGroup, derived: list[str]) -> nn.Module:
    """The model with the parameters and buffers of the first rank, but for those that are derived of others."""
    _verify_param_shape_across_processes(group, list(model.parameters()))
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        if name not in derived:
            distributed.broadcast(value.detach(), distributed.get_global_rank(group, 0), group)
    return model
