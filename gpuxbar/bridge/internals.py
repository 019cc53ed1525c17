"""Private names of PyTorch that the library imports, since nothing public does the same: here alone, so that a PyTorch without
one of these names is refused when the library is imported, and not amid a training.

What each is for, and why the public way is none:

    _disable_dynamo                         `torch.compiler.disable`, which imports torch._dynamo, for seconds, where it is written
    _will_engine_execute_node               whether a backward pass goes on to a weight; `needs_input_grad` says whether any might
    _current_graph_task_id                  which backward pass this is
    _DisableAutocast                        `torch.autocast` knows no device "meta"
    _AutoDispatchBelowAutograd and the rest of torch._C     what `torch.library.custom_op` does, in less time
    _ConvNd, _BatchNorm, _NormBase          classes that public ones share
    _has_any_global_hook                    whether a module's call is more than its forward
    _verify_param_shape_across_processes    what `DistributedDataParallel` does before it sends parameters
"""

from __future__ import annotations

import torch

try:
    from torch import _disable_dynamo
    from torch._C import (
        _are_functorch_transforms_active,
        _AutoDispatchBelowAutograd,
        _current_graph_task_id,
        _DisableAutocast,
        _get_tracing_state,
        _len_torch_dispatch_stack,
        _will_engine_execute_node,
    )
    from torch._C._autograd import _profiler_enabled
    from torch._C._functorch import is_functorch_wrapped_tensor, is_legacy_batchedtensor
    from torch.distributed.utils import _verify_param_shape_across_processes
    from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
    from torch.nn.modules.conv import _ConvNd
    from torch.nn.modules.module import _has_any_global_hook
except ImportError as error:
    raise ImportError(
        f"gpuxbar: torch must have what 2.11 to 2.14 have, got {torch.__version__}: {error}; install one of these, or a later gpuxbar"
    ) from error

__all__ = [
    "_AutoDispatchBelowAutograd",
    "_BatchNorm",
    "_ConvNd",
    "_DisableAutocast",
    "_NormBase",
    "_are_functorch_transforms_active",
    "_current_graph_task_id",
    "_disable_dynamo",
    "_get_tracing_state",
    "_has_any_global_hook",
    "_len_torch_dispatch_stack",
    "_profiler_enabled",
    "_verify_param_shape_across_processes",
    "_will_engine_execute_node",
    "is_functorch_wrapped_tensor",
    "is_legacy_batchedtensor",
]
