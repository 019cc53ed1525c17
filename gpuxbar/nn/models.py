"""The crossbar layers of a model, and what a model must be for them to be worked on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from gpuxbar.nn.analog_layer import AnalogLayer

__all__ = [
    "converted_layers",
    "crossbar_layers",
    "holders",
    "known_name",
    "require_apart",
    "require_module",
    "require_whole",
]

WRAPPERS = DataParallel, DistributedDataParallel, AveragedModel  # which call what they wrap `module`
# as do torch.compile, FSDP and wrappers of checkpoints, whose classes would take long to import, and their names are nobody else's
WRAPPED = "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"


def require_module(op: str, model: Any, argument: str = "model") -> None:
    """Refuse what is no module, as what `gpuxbar.convert` returns as a whole."""
    if not isinstance(model, nn.Module):
        what = f"the class {model.__name__}" if isinstance(model, type) else type(model).__name__
        raise TypeError(
            f"{op}: `{argument}` must be a torch.nn.Module, got {what}; pass the model itself, which gpuxbar.convert returns beside a report"
        )


def holders(modules: Iterable[nn.Module]) -> Counter[Tensor]:
    """How many of these modules hold each parameter themselves."""
    return Counter(p for module in modules for p in module.parameters(recurse=False))


def known_name(model: nn.Module, name: str) -> str:
    """A name inside a model as it was before the model, or a part of it, was compiled or wrapped."""
    known = []
    at: Any = model
    for leaf in name.split("."):
        if leaf not in WRAPPED and not (leaf == "module" and isinstance(at, WRAPPERS)):
            known.append(leaf)
        at = getattr(at, leaf, None)
    return ".".join(known)


def crossbar_layers(op: str, model: nn.Module) -> dict[str, AnalogLayer]:
    """The crossbar layers of a model, by name as it was before it was compiled or wrapped."""
    require_module(op, model)
    return {
        known_name(model, name): module
        for name, module in model.named_modules()
        if isinstance(module, AnalogLayer)
    }


def converted_layers(op: str, model: nn.Module) -> list[AnalogLayer]:
    """The crossbar layers of a model, which must have such."""
    layers = list(crossbar_layers(op, model).values())
    if not layers:
        raise ValueError(
            f"{op}: `model` must have crossbar layers, got none; pass the copy that has them: model, report = gpuxbar.convert(model, spec)"
        )
    return layers


def require_apart(op: str, layers: Iterable[AnalogLayer]) -> None:
    """Refuse layers of one seed: their devices and their noise would be the same. Those that draw nothing may be."""
    seen: dict[int, AnalogLayer] = {}
    for layer in layers:
        if layer.spec.draws and seen.setdefault(layer.plan.seed, layer) is not layer:
            raise ValueError(
                f"{op}: crossbar layers must each have a name, or a seed in their spec, of their own, got {layer.name!r} twice; "
                "their devices and noise would be alike: convert models as parts of one or by specs of other seeds, copy a model before that, "
                "and pass name=... to layers made otherwise"
            )


def require_whole(op: str, model: nn.Module) -> None:
    """Refuse a model that `fully_shard` has, whose weights are gathered for its passes alone."""
    shard = next((name for name, p in model.named_parameters() if hasattr(p, "full_tensor")), None)
    if shard is not None:
        raise ValueError(
            f"{op}: `model` must be whole, got shards of {known_name(model, shard)}; call gpuxbar.{op} before fully_shard, or on "
            "another model that loads its whole state"
        )
