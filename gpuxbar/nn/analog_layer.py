"""What layers on crossbars share: hardware-aware training with any torch optimiser."""

from __future__ import annotations

import warnings
import zlib
from dataclasses import replace
from math import ceil
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, distributed
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from gpuxbar.bridge.analog_mvm import NOT_PACKED, analog_mvm, driven_lines
from gpuxbar.bridge.internals import _disable_dynamo, is_functorch_wrapped_tensor
from gpuxbar.bridge.lines import image_shape
from gpuxbar.bridge.operator import alone, call
from gpuxbar.bridge.outer_product import shared_weight
from gpuxbar.bridge.passes import require_first_pass
from gpuxbar.bridge.reprogram import program_devices, reprogram, require_finite_weight
from gpuxbar.bridge.wires import weight_through_wires
from gpuxbar.mapping import plan_reads
from gpuxbar.mapping.plan import ReadPlan
from gpuxbar.nn.cells import Cells, Steady
from gpuxbar.nn.converters import CONVERTERS, Converters
from gpuxbar.ops import PackedConductance
from gpuxbar.reference import Purpose, uniforms
from gpuxbar.spec import CrossbarSpec

__all__ = ["COUNTED", "AnalogLayer"]

COUNTED = "read_step", "eval_step", "dac_max"  # buffers of a layer that change with each of its reads
CELLS = "cells", "noise_var", "full_pair", "written"  # buffers of what was programmed
TEST_INPUTS = 32  # of a test read


class AnalogLayer(Converters):
    """What the layers share: programming when the weights change, reads and their counters.

    Buffers of the state dict: `read_step` counts reads in training mode, `eval_step` those in eval mode, downwards from 0, so that
    these leave the noise of training as it is, and `write_step` rewritings (`rewrite`); with the spec's seed and the weights they
    fix every random number, so a checkpoint resumes bit for bit. Those of converters: see `Converters`.
    Reads are computed in float32 whatever the precision of the weights, which is that of the output.
    """

    weight: Tensor
    bias: Any  # Tensor or None, which nn.Linear and nn.Conv2d declare differently
    read_step: Tensor
    eval_step: Tensor
    write_step: Tensor
    cells: Tensor
    noise_var: Tensor | None
    full_pair: Tensor
    written: Tensor
    packed: Tensor | None
    back_packed: Tensor | None
    packed_state: Tensor | None

    def setup(self, spec: CrossbarSpec, name: str, groups: int, **geometry: Any) -> None:
        """Plan the reads and make the buffers; `name` separates the draws of one model's layers."""
        self.spec, self.name, self.groups_ = spec, name, groups
        self.inputs, self.outputs = self.weight[0].numel(), self.weight.shape[0] // groups
        seed = (spec.seed ^ zlib.crc32(name.encode()) << 31) & (2**63 - 1)
        plan, self.planes = plan_reads(
            spec, inputs=self.inputs, outputs=self.outputs, groups=groups, seed=seed, name=name
        )
        self.set_plan(replace(plan, **geometry))
        device = self.weight.device
        for counter in ("read_step", "eval_step", "write_step"):
            self.register_buffer(counter, torch.zeros(1, dtype=torch.int64, device=device))
        extra_rows, extra_cols = self.plan.reference_lines
        sensed = groups * (self.outputs + extra_cols), groups * (self.inputs + extra_rows)
        self.setup_converters(sensed)
        # wires act on every device, so planes are programmed apart and merged behind them
        planes = 2 * spec.mapping.slices if spec.parasitics.active else len(self.plan.slice_scale)
        shape = (planes, sensed[1], self.outputs + extra_cols)
        self.register_buffer(
            "cells", torch.zeros(shape, dtype=torch.float32, device=device), persistent=False
        )
        noise = torch.zeros(shape, dtype=torch.float32, device=device) if spec.read_noise.sigma_g else None
        self.register_buffer("noise_var", noise, persistent=False)
        self.register_buffer(
            "full_pair", torch.zeros(sensed[0], dtype=torch.float32, device=device), persistent=False
        )
        self.register_buffer("written", torch.zeros(2, dtype=torch.int64, device=device), persistent=False)
        # the weight that the cells are of, held so that no other takes its place in memory
        self._cells_of: Tensor | None = None
        self._setup_packing(device)
        self.setup_programmed()
        self.setup_wires(shape, len(self.plan.slice_scale), device)
        self.setup_in_situ()

    def _setup_packing(self, device: torch.device) -> None:
        """Buffers for what reads on a GPU keep of the conductances, None unless they do: memory of both directions, and the
        states of `ops.PackedConductance`, int64 [2, 2]."""
        way = self.plan
        gathered = self.weight.dim() > 2 and way.line_order == "channel_position"
        positions = int(np.prod(self.weight.shape[2:])) if gathered else 0
        rows, cols = way.reference_lines
        for name, read, lines, transposed in (
            ("packed", way.forward, (self.inputs, self.outputs + cols), False),
            ("back_packed", way.backward, (self.inputs + rows, self.outputs), True),
        ):
            memory = None
            if self.spec.keep_packed and read.code_max and read.adc_bits:
                shape = (len(way.slice_scale), self.groups_ * lines[0], lines[1])
                size = PackedConductance.size(
                    shape, tile=read.tile, transposed=transposed, groups=self.groups_, precision=way.precision,
                    positions=0 if transposed else positions, noise_var=self.spec.read_noise.sigma_g > 0,
                )  # fmt: skip
                memory = torch.zeros(size, dtype=torch.uint8, device=device)
            self.register_buffer(name, memory, persistent=False)
        state = torch.zeros(2, 2, dtype=torch.int64, device=device) if self.spec.keep_packed else None
        self.register_buffer("packed_state", state, persistent=False)

    def set_plan(self, plan: ReadPlan) -> None:
        """Read as planned here from now on."""
        self.plan = plan
        self.static = (plan.dumps(), self.spec.model_dump_json())

    def rewrite(self) -> None:
        """Write the present weights once more, with new write noise (not for layers trained in situ)."""
        self.require_unprogrammed("rewrite")
        self.leave_cells()
        self.write_step += 1

    def conductances(self, weight: Tensor | None = None) -> Cells:
        """What a read finds: programmed if the weights changed, or trained in situ; seen through the wires.

        Args:
            weight: The layer's, where it has just been computed: by dropout, say, another at every look. None: look.
        """
        if self.programmed:
            return self.aged_cells()
        if self.in_situ:
            return self.trained_cells()
        weight = self.weight if weight is None else weight
        if not torch.compiler.is_compiling() and (
            self._cells_of is None or self._cells_of.data_ptr() != weight.data_ptr()
        ):
            self._require_shape(weight)
            if self._cells_of is not None:
                self.leave_cells()
            self._cells_of = weight.detach()
        held: Any = self._buffers  # whose values nn.Module finds slowly
        cells, noise_var, w_max, written = map(held.get, CELLS)
        wires, (plan, spec) = held["seen"] is not None, self.static
        merge = "none" if wires else self.planes.merge
        call(
            reprogram, weight.detach(), cells, noise_var, w_max, written, held["write_step"], spec, merge, plan
        )  # fmt: skip
        if self.plan.reference != (0, 0):  # those of reference lines too
            w_max = w_max.view(self.groups_, -1)[:, : self.outputs].reshape(-1)
        if wires:
            return self.through_wires(cells, noise_var, w_max, written[:1])
        return Cells(cells, None, noise_var, w_max, written)

    def _require_shape(self, weight: Tensor) -> None:
        """Refuse a weight that does not fit the layer's arrays."""
        lines = self.groups_ * self.outputs, self.inputs
        if (len(weight), weight[0].numel()) != lines:
            raise ValueError(
                f"{self.name}: `weight` must fit the arrays of {lines[1]} x {lines[0]} that the layer was made with, got shape "
                f"{tuple(weight.shape)}; change its size before gpuxbar.convert"
            )

    def forget_wires(self) -> None:
        """Solve and pack anew at the next read, whatever the state of the devices says: buffers were set from outside."""
        super().forget_wires()
        if self.packed_state is not None:
            self.packed_state.zero_()

    def leave_cells(self) -> None:
        """See `Wires.leave_cells`. A weight that changes in place needs none of it: autograd refuses passes of the old one."""
        super().leave_cells()
        self.renew(*CELLS)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_cells_of": None}  # nobody has read what is copied

    def program(self, chip: int = 0) -> None:
        """Write the present weights once (not those of cells trained in situ) to the arrays of a chip, see `gpuxbar.program`, and
        read these devices from now on."""
        self.require_writable()
        self.write_once(chip)

    def write_once(self, chip: int) -> None:
        """`program` what is known to be writable."""
        if self.g_cells is not None and self.w_max is not None:
            self.hold(self.g_cells.clone(), self.w_max.clone(), self.seed_of_cells, chip)
        else:
            seed = self.plan.seed ^ chip
            plan = replace(self.plan, seed=seed).dumps()
            devices = program_devices(self.weight, self.write_step + 1, self.static[1], plan)
            self.hold(*devices, seed, chip)

    def require_writable(self) -> None:
        """Refuse what `program` cannot write: a weight that is computed of others, that is not what cells trained in situ read, or, on
        a CPU, that is not finite."""
        self.require_own_weight("program")
        if self.in_situ:
            self.require_read_out()
        elif self.weight.is_cpu:
            require_finite_weight(self.weight, self.name)

    @torch.no_grad()
    def look_compensated(self, seconds: float) -> None:
        """Read the devices as they are that long after programming, with `gain` what a test read gives as programmed over what it
        gives then."""
        assert self.gain is not None
        self.look_after(0.0)
        before = self._test_read()
        self.look_after(seconds)
        now = self._test_read()
        if before.item() > 0 == now.item():
            raise ValueError(
                f"{self.name}: `compensate` must be False where a test read finds nothing, got codes of 0 at an age of {seconds:g} "
                "s; leave it out, or give the ADC a smaller range"
            )
        self.gain.copy_(torch.where(before > 0, before / now, 1.0))

    def _test_read(self) -> Tensor:
        """Sum of the magnitudes of the products with fixed inputs that fill the DAC's range, float32 [1]."""
        kernel = image_shape(self.weight.shape)[2:]
        patch = [
            dilation * (size - 1) + 1 for dilation, size in zip(self.plan.dilation, kernel, strict=False)
        ]
        channels = self.groups_ * self.weight.shape[1]
        size = channels * int(np.prod(patch))
        u = uniforms(np.arange(TEST_INPUTS), size, purpose=Purpose.TEST_READ, seed=self.plan.seed)
        # cubes: rare large values, as activations have, fill neither range of converters
        x = torch.from_numpy(u if not self.spec.dac.signed else 2 * u - 1).float() ** 3
        x = x.to(self.weight.device).view(TEST_INPUTS, channels, *patch)
        dac = self.spec.dac
        top = torch.ones_like(self.dac_max)
        if dac.range in ("fixed", "ema"):
            top = torch.where(self.dac_max > 0, self.dac_max, top)
        lsb = top / max(dac.code_max, 1)
        y = self._products((x * top).contiguous(), self.weight.detach(), lsb, None, self.conductances())
        return y.abs().sum().reshape(1)

    def lines(self, cells: Tensor, transposed: bool) -> Tensor:
        """The cells that a read drives, [S, G * I, O]: without the other side's reference lines."""
        return driven_lines(cells, self.plan, transposed)

    @torch.no_grad()
    def tile_circuit(self, plane: int = 0, row: int = 0, col: int = 0, *, group: int = 0) -> dict[str, Any]:
        """One tile's devices and wires as `gpuxbar.circuit` takes them: `circuit.draw_ir_drop(v, **layer.tile_circuit())`.

        Args:
            plane: Of 2 `mapping.slices`: positive devices first, least significant slice first.
            row, col: Row tile and column tile of the plane; `repr(layer)` says how many there are.
            group: Of a convolution with `groups`.

        Returns:
            `g`, float32 [R, C], S, as devices are now, without the empty rest of an edge tile; `r_wordline`, `r_bitline`, `r_source`
            and `r_sink`, ohm, of a forward read.

        Raises:
            ValueError: There is no such tile; the layer's wires are ideal, or share drivers with other tiles.
        """
        wires, size = self.spec.parasitics, self.spec.tile
        if not wires.active or wires.shared_drivers:
            got = "drivers that column tiles share" if wires.active else "ideal wires"
            raise ValueError(
                f"{self.name}: `parasitics` must give every tile wires of its own for tile_circuit, got {got}; set a resistance, and "
                "shared_drivers=False"
            )
        self.conductances()  # written, where weights changed since the last read
        planes = self._devices().unflatten(1, (self.groups_, -1))
        counts = {
            "plane": len(planes), "row": ceil(self.inputs / size.rows), "col": ceil(self.outputs / size.cols), "group": self.groups_,
        }  # fmt: skip
        for (name, count), index in zip(counts.items(), (plane, row, col, group), strict=True):
            if index not in range(count):
                raise ValueError(
                    f"{self.name}: `{name}` must be 0 to {count - 1}, got {index!r}; choose one of the layer's"
                )
        g = planes[plane, group].split(size.rows)[row].split(size.cols, 1)[col]
        ohms = ("r_wordline", "r_bitline", "r_source", "r_sink")
        return {"g": g.cpu().numpy().copy(), **{name: getattr(wires, name) for name in ohms}}

    def clip_rate(self) -> float:
        """Share of the weights beyond `mapping.w_max`, or at the bounds of cells trained in situ."""
        law, mapping = self.spec.update, self.spec.mapping
        if self.in_situ and law is not None and law.sides == "reference" and mapping.slices == 1:
            return self.at_window_ends()
        limit = self.w_max if self.in_situ else mapping.w_max
        if limit is None:
            return 0.0
        weight = self.weight.detach().reshape(self.groups_ * self.outputs, -1).abs()
        bound = limit.view(-1, 1) * (1 - 1e-6) if isinstance(limit, Tensor) else limit
        return (weight > bound).float().mean().item()

    def steady(self) -> Steady:
        """For reads over and over before anything changes the layer."""
        weight = self.look_at_weight()
        return Steady(self.conductances(weight), shared_weight(weight))

    def read(self, x: Tensor, steady: Steady | None = None) -> Tensor:
        """Products of x with the devices of now, or of `steady()` if nothing has changed since."""
        if x.is_complex():
            raise TypeError(
                f"{self.name}: `x` must be real, got {x.dtype}; take real and imaginary parts apart"
            )
        if x.shape[0] == 0:
            return self._of_nothing(x)
        self.require_calibrated()
        self.require_ranks()
        follows = self._follows_inputs()
        if follows and not torch.compiler.is_compiling():
            require_first_pass(self.name)
        if steady is None:
            weight = self.look_at_weight()
            if not torch.compiler.is_compiling() and (
                is_functorch_wrapped_tensor(x) or is_functorch_wrapped_tensor(weight)
            ):
                raise TypeError(
                    f"{self.name}: `x` and `weight` must be plain tensors, got those of a transform of torch.func, which crossbars do "
                    "not follow; call backward() or torch.autograd.grad"
                )
            cells = self.conductances(weight)
        else:
            cells, weight = steady
        if x.device != weight.device:
            raise ValueError(
                f"{self.name}: `x` must be on the layer's device, {weight.device}, got {x.device}; move the batch or the model"
            )
        x, lsb = x.float().contiguous(), None
        if not self.fits_inputs:
            top = self.dac_top(x)
            x, lsb = self.dac_inputs(x, top)
        passes_gradients = x.requires_grad
        bias = self.bias
        bias = None if bias is None else bias.float()
        watched = self.keeps_operands and weight.requires_grad and torch.is_grad_enabled()
        products = self._watched_products if watched else self._products
        y = products(x, weight, lsb, bias, cells)
        if passes_gradients:
            self.await_gradient(y)
        if follows:
            self.dac_max.copy_(top)
        return y if y.dtype is weight.dtype else y.to(weight.dtype)

    def refuse_input(self, x: Tensor, shape: str) -> NoReturn:
        """Say of what shape `x`, which is no input of the layer, must be."""
        raise ValueError(
            f"{self.name}: `x` must have shape {shape} for the layer's weights, got {tuple(x.shape)}; look at the layer before it"
        )

    def _of_nothing(self, x: Tensor) -> Tensor:
        """The products of no sample, as experts and detectors may have: nothing is driven or counted, and gradients are 0."""
        weight, bias, way = self.look_at_weight(), self.bias, self.plan
        weight = weight.detach() if self.keeps_operands else weight
        with torch.autocast(x.device.type, enabled=False):
            x = x.to(weight.dtype)
            if self.spec.dac.range == "learned":  # which gets a gradient of 0 too
                x = x + self.dac_max.to(weight.dtype)
            if x.dim() == 2:
                return functional.linear(x, weight, bias)
            kernel = weight.reshape(image_shape(weight.shape))
            return functional.conv2d(x, kernel, bias, way.stride, way.padding, way.dilation, self.groups_)

    def crossbars(self) -> str:
        """What the layer runs on, for `extra_repr`: tiles of a plane along inputs and outputs, and what is not ideal."""
        spec = self.spec
        tile, slices, law = spec.tile, spec.mapping.slices, spec.update
        count = self.groups_ * ceil(self.inputs / tile.rows), ceil(self.outputs / tile.cols)
        said = [f"tiles={count[0]}x{count[1]} of {tile.rows}x{tile.cols}"]
        said += [f"slices={slices} of {spec.mapping.slice_bits} bits"] if slices > 1 else []
        said += [
            f"{key}={part.bits} bits"
            for key, part in (("dac", spec.dac), ("adc", spec.adc))
            if part.bits is not None
        ]
        said += [f"in_situ={law.law}"] if self.in_situ and law is not None else []
        said += ["programmed=True"] if self.programmed else []
        return ", ".join(said)

    def reads(self) -> int:
        """How often the layer's arrays were read forwards, in training and in eval mode."""
        return int(self.read_step - self.eval_step) - self.counted_apart()

    def counter(self) -> tuple[Tensor, int]:
        """Number of the last read, int64 [1], which fixed its noise, and what the next one adds to it: reads of training count up,
        others down."""
        held: Any = self._buffers
        return (held["read_step"], 1) if self.training else (held["eval_step"], -1)

    def require_ranks(self) -> None:
        """Refuse a pass of data-parallel training that does not know of the other ranks, and warn of one that may be such."""
        if (
            self.streams.group is not None
            or not distributed.is_available()
            or not distributed.is_initialized()
        ):
            return
        noise = self.spec.read_noise
        if not (self.keeps_operands or noise.sigma or noise.sigma_g):
            return
        what = "pulse trains and bit streams" if self.keeps_operands else "rows that draw read noise"
        if self._is_shared_out():
            raise ValueError(
                f"{self.name}: {what} must be those of all ranks, got a model that DistributedDataParallel or FSDP wraps itself; wrap it "
                "by gpuxbar.distribute(model), or call gpuxbar.distribute(model, wrap=False) before a framework or fully_shard wraps it"
            )
        trains = self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if trains and distributed.get_world_size() > 1:
            warnings.warn(
                f"gpuxbar: {what} are this process's alone, of {distributed.get_world_size()} that torch.distributed runs; if these share "
                "batches, call gpuxbar.distribute(model, wrap=False) on each before a framework wraps the model",
                RuntimeWarning,
                stacklevel=2,
            )

    def _is_shared_out(self) -> bool:
        """Whether other ranks read other samples with this layer: under `DistributedDataParallel`, and where FSDP has put a weight
        that it gathers from the ranks in the place of the layer's own, or of what it is computed of."""
        if DistributedDataParallel._get_active_ddp_module() is not None:
            return True
        # by `functional_call`
        lent = "weight" not in vars(self) and type(self._parameters.get("weight")) is Tensor
        return not lent and not any(hasattr(parameter, "analog") for parameter in self.parameters())

    def _devices(self) -> Tensor:
        """Conductances of a layer with wires, on their near side: [2 slices, G * I, O], S."""
        if self.aged is not None:
            return self.aged
        return self.cells if self.g_cells is None else self.g_cells

    def _products(
        self, x: Tensor, weight: Tensor, lsb: Tensor | None, bias: Tensor | None, cells: Cells
    ) -> Tensor:
        """One read: x in the DAC's range, whose codes are worth `lsb` (None: the range fits x); the gradient goes to `weight`."""
        if self.spec.parasitics.exact_gradient and torch.is_grad_enabled():
            weight = call(
                weight_through_wires,
                weight,
                self._devices(),
                cells.w_max,
                self.groups_,
                self.in_situ,
                self.static[1],
            )
        held: Any = self._buffers
        adc_range, back_adc_range, *errors = map(held.get, CONVERTERS)
        packing = NOT_PACKED
        if held["packed_state"] is not None:
            # a copy: backward reads the devices of now, whatever their number is then
            packing = self.packed, self.back_packed, self.packed_state, cells.version[:1].clone()
        weight = weight.unsqueeze(2) if weight.dim() == 3 else weight  # as of images
        args = (
            x, weight, *cells[:4], bias, lsb, adc_range, back_adc_range, *errors, *self.counter(), *packing, self.static[0],
            torch.is_grad_enabled(),
        )  # fmt: skip
        # not where a tracer looks on, which gives no values
        if torch.compiler.is_compiling() or not (self._looks_at_clipping() and alone(args)):
            return call(analog_mvm, *args)[0]
        y, _, gate, *_ = analog_mvm(*args)  # which `call` shows to backward alone
        self._warn_of_clipping(gate)
        return y

    @_disable_dynamo  # a compiled graph knows no more of a weight than its values
    def _watched_products(
        self, x: Tensor, weight: Tensor, lsb: Tensor | None, bias: Tensor | None, cells: Cells
    ) -> Tensor:
        """`_products` whose backward passes leave operands in place of a gradient."""
        return self._products(x, self.streams.taking(weight), lsb, bias, cells)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Follow a model to another device; where it changes precision, arrays and ranges keep theirs, and a weight trained in situ
        is what the cells read there."""
        if self.written.is_meta and not fn(self.written).is_meta:
            self._refuse_filling("empty memory instead of the meta device's")
        buffers, held = dict(self._buffers), self.is_held()
        trained = self.weight.dtype if self.in_situ and self.is_read_out() else None
        super()._apply(fn, recurse)
        self._held = self.mark() if held else None
        for name, new in self._buffers.items():
            old = buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        if trained is not None and self.weight.dtype != trained:  # not what another precision left of it
            self.read_out()
        return self

    def _refuse_filling(self, got: str) -> NoReturn:
        """Refuse to fill a layer of the meta device."""
        raise ValueError(
            f"{self.name}: a crossbar layer must have its values from gpuxbar.convert, got {got}, which a state dict fills in part; call "
            "to_empty() and load the model before gpuxbar.convert"
        )

    @torch.inference_mode(False)  # whose tensors nothing could train elsewhere
    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *more: Any) -> None:
        if self.written.is_meta:
            self._refuse_filling("a state dict for one of the meta device")
        counted = state_dict.get(f"{prefix}read_step")
        if counted is not None:  # perhaps of before reads in eval mode were counted apart
            state_dict.setdefault(f"{prefix}eval_step", torch.zeros_like(counted))
        absent = [name for name, buffer in self._buffers.items() if buffer is None]
        errors: list[str] = more[-1]
        known, fits = len(errors), False
        try:
            super()._load_from_state_dict(state_dict, prefix, *more)
            fits = len(errors) == known  # which torch raises otherwise
        finally:
            if not fits:  # what was made to be filled holds nothing
                self._buffers.update(dict.fromkeys(absent))
