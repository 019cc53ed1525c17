"""The table of a model's arrays."""

from __future__ import annotations

import pytest
import torch
from torch import distributed, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.optim.swa_utils import AveragedModel

import gpuxbar as gx

WIRES = {
    "r_wordline": 2.0, "r_bitline": 2.0, "r_source": 100.0, "r_sink": 100.0, "anchor": "ladder", "refresh_interval": 4,
}  # fmt: skip


def test_tables_show_where_a_prompt_echoes_them():
    model, report = gx.convert(nn.Sequential(nn.Linear(3, 2)), gx.CrossbarSpec())
    errors = gx.conversion_errors(model, [torch.rand(4, 3)])
    for table, head in ((report, "module"), (gx.telemetry(model), "layer"), (errors, "layer")):
        assert repr(table) == str(table)
        assert repr(table).split()[0] == head


def checkpointed_within(model):
    part = model[2]
    model[2] = checkpoint_wrapper(part, context_fn=lambda: gx.same_reads(part))
    return model


def compiled_within(model):
    model[2] = torch.compile(model[2], backend="eager")
    return model


def in_parallel_within(model):
    model[2] = nn.DataParallel(model[2])
    return model


WRAPPED = {
    "in parallel within": in_parallel_within,
    "compiled": lambda model: torch.compile(model, backend="eager"),
    "compiled within": compiled_within,
    "checkpointed within": checkpointed_within,
    "in parallel": nn.DataParallel,
    "average of a compiled one": lambda model: AveragedModel(torch.compile(model, backend="eager")),
    "across processes": gx.distribute,
}


@pytest.fixture
def one_process(tmp_path):
    distributed.init_process_group("gloo", f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.usefixtures("one_process")
def test_tables_and_rules_name_layers_as_before_a_model_was_compiled_or_wrapped(kind):
    spec = gx.CrossbarSpec(read_noise={"sigma": 1e-8})
    plain = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2)))
    model, rows = gx.convert(plain, spec, rules={"2.1": None})
    names = [layer.name for layer in (model[0], model[2][0])]
    wrapped = WRAPPED[kind](model)
    assert [row.layer for row in gx.telemetry(wrapped).layers] == names
    errors = gx.conversion_errors(wrapped, [torch.rand(5, 4)]).reads
    assert [row.layer for row in errors] == [name for name in names for _ in range(2)]
    if kind != "across processes":  # which takes converted models
        wrapped = WRAPPED[kind](plain)
    again, found = gx.convert(wrapped, spec, rules={"2.1": None})
    assert [row.module for row in found.rows] == [row.module for row in rows.rows] == ["0", "2.0", "2.1"]
    layers = [layer for layer in again.modules() if isinstance(layer, gx.nn.AnalogLinear)]
    assert [layer.name for layer in layers] == names  # and so draw the same


def test_telemetry_tells_what_became_of_the_arrays():
    spec = gx.CrossbarSpec(
        device={"g_max": 1e-4},
        update={"law": "constant_step", "pulses": 50},
        parasitics=WIRES,
        endurance={"pulses": 1.0, "failed": "g_max"},
    )
    digital = nn.Sequential(nn.Linear(20, 9), nn.ReLU(), nn.Linear(9, 4), nn.Linear(4, 2))
    model, _ = gx.convert(digital, spec, rules={"3": None})
    fresh = gx.telemetry(model).layers
    assert [(row.layer, row.state, row.reads, row.updates) for row in fresh] == [
        ("0", "hardware-aware", 0, 0), ("2", "hardware-aware", 0, 0),
    ]  # fmt: skip
    optimiser = gx.optim.InSituSGD(model.parameters(), lr=0.5)
    for _ in range(3):
        optimiser.zero_grad()
        model(torch.randn(5, 20)).square().mean().backward()
        optimiser.step()
    model(torch.randn(1, 20))
    states = {key: value.clone() for key, value in model.state_dict().items()}
    found = gx.telemetry(model)
    for row, layer in zip(found.layers, (model[0], model[2]), strict=True):
        assert (row.state, row.reads, row.updates) == ("in situ", 4, 4)  # the first is that of beginning
        assert (row.clipped, row.saturation) == (layer.clip_rate(), layer.saturation())
        assert 0 < row.wire_error == layer.wire_error()
        assert 0 < row.worn == layer.worn()
        assert row.age == 0
    assert str(found).splitlines()[0].split("  ")[0] == "layer"
    assert len(str(found).splitlines()) == 3
    assert all(torch.equal(value, states[key]) for key, value in model.state_dict().items())
    gx.program(model)
    gx.age(model, "1h")
    assert [(row.state, row.age) for row in gx.telemetry(model).layers] == [("programmed", 3600.0)] * 2
    assert gx.telemetry(digital).layers == ()
    with pytest.raises(
        ValueError, match="telemetry: `model` must hold its numbers, got '0' on the meta device"
    ):
        gx.telemetry(model.to("meta"))


CONVERTED = {"dac": {"bits": 8}, "adc": {"bits": 8, "range": "worst_case"}}
SOFT = {"update": {"law": "soft_bounds"}}
SLICED = {"mapping": {"slices": 4, "slice_bits": 2}}
NOISE = {"read_noise": {"sigma_g": 1e-8}}
WIRED = {"parasitics": {"r_wordline": 1.0}}
ANCHORED = {"parasitics": {"r_wordline": 1.0, "anchor": "ladder"}}
BYTES = {
    "merged": ({}, None, 4),
    "subtracted": (CONVERTED | {"mapping": {"scheme": "subtracted"}}, None, 4),
    "differential": (CONVERTED, None, 8),
    "slices": (CONVERTED | SLICED, None, 32),
    "noise": (CONVERTED | NOISE, None, 16),
    "wires": (WIRED, None, 12),
    "wires-noise": (WIRED | NOISE, None, 20),
    "differential-wires": (CONVERTED | WIRED, None, 16),
    "anchored": (ANCHORED, None, 28),
    "sliced-wires": (SLICED | WIRED, None, 36),
    "sliced-anchored": (SLICED | ANCHORED, None, 100),
    "programmed": ({}, gx.program, 16),
    "programmed-differential": (CONVERTED, gx.program, 24),
    "programmed-noise": (CONVERTED | NOISE, gx.program, 40),
    "programmed-wires": (WIRED, gx.program, 28),
    "programmed-wires-noise": (WIRED | NOISE, gx.program, 44),
    "programmed-differential-wires": (CONVERTED | WIRED, gx.program, 32),
    "programmed-sliced-anchored": (SLICED | ANCHORED, gx.program, 164),
    "in-situ": (SOFT, "sgd", 12),
    "in-situ-slices": (SOFT | SLICED | {"carry": {}}, "sgd", 36),
    "mixed-precision": (SOFT, "mixed-precision", 16),
    "tiki-taka": (SOFT, "tiki-taka", 32),
    "tiki-taka-v2": (SOFT, "tiki-taka-v2", 36),
    "agad": (SOFT, "agad", 44),
}


@pytest.mark.parametrize("name", BYTES)
def test_arrays_take_the_memory_that_the_readme_tells(name):
    settings, act, wanted = BYTES[name]
    model, _ = gx.convert(nn.Sequential(nn.Linear(256, 128, bias=False)), gx.CrossbarSpec(**settings))
    held = [model]
    if isinstance(act, str):
        held += gx.optim.build_optimizer(act, model, lr=0.1).parts.values()
    elif act:
        act(model)
    model(torch.ones(1, 256))
    tensors = [t for part in held for t in (*part.buffers(), *part.parameters())]
    beside = sum(t.numel() * t.element_size() for t in tensors) - 4 * 256 * 128
    assert beside / (256 * 128) == pytest.approx(wanted, abs=0.1)


def test_names_of_children_that_are_called_as_wrapped_ones_stay():
    model, report = gx.convert(nn.ModuleDict({"module": nn.Linear(4, 3)}), gx.CrossbarSpec(), {"module": {}})
    assert [row.module for row in report.rows] == ["module"]
    assert [row.layer for row in gx.telemetry(model).layers] == ["module"]


@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")  # with one process
@pytest.mark.usefixtures("one_process")
def test_names_within_what_fsdp_wraps_stay():
    model, _ = gx.convert(nn.Sequential(nn.Linear(4, 3)), gx.CrossbarSpec())
    cpu = {"device_id": torch.device("cpu")}
    model = FullyShardedDataParallel(gx.distribute(model, wrap=False), use_orig_params=True, **cpu)
    assert [row.layer for row in gx.telemetry(model).layers] == ["0"]
