"""Two processes that share a batch train as one does: the same reads, the same updates."""

from __future__ import annotations

import os
import sys
import warnings

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import prune

import gpuxbar as gx

SPECS = {
    "digital": {},
    "recurrent": {},
    "learned": {
        "dac": {"bits": 8, "range": "learned", "max": 1.0},
        "backward": {"dac": {"bits": 8, "range": "sample"}},
    },
    "in situ": {"update": {"law": "soft_bounds"}},
    "pulses": {"update": {"law": "soft_bounds"}, "pulses": {}},
    "agad": {"update": {"law": "soft_bounds"}, "pulses": {}},
    "streams": {
        "update": {"law": "soft_bounds"}, "mapping": {"scheme": "differential", "slices": 3, "slice_bits": 2},
        "carry": {"scheme": "streamed"},
    },
}  # fmt: skip
SHARDED = ("digital", "recurrent")
GROUPED = ("digital", "pulses")
READS = {
    "tile": {"rows": 8, "cols": 8},
    "mapping": {"scheme": "subtracted"},
    "dac": {"bits": 8, "range": "sample"},
    "adc": {"bits": 8, "range": "worst_case"},
    "read_noise": {"sigma": 2e-7},
}


class Sequences(nn.Module):
    """The rows of an image, one after the other."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(6, 5, 2, bidirectional=True)

    def forward(self, x):
        return self.lstm(x.squeeze(1).transpose(0, 1))[0].transpose(0, 1)


class Framed(nn.Module):
    """A model as a framework wraps it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x)


def network(kind):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4))
    if kind == "recurrent":
        model = Sequences()
    return gx.convert(model, gx.CrossbarSpec.model_validate({**READS, **SPECS[kind]}))[0]


def train(kind, model, run, x):
    """The first outputs, and the weights after some steps: two, or as many as a fast array is read before it is written by."""
    if kind == "agad":
        optimiser = gx.optim.AGAD(model.parameters(), lr=0.5, lines=64, period=1)
    else:
        make = gx.optim.InSituSGD if "update" in SPECS[kind] else torch.optim.SGD
        optimiser = make(model.parameters(), lr=0.5)
    first = None
    for _ in range(4 if kind == "agad" else 2):
        optimiser.zero_grad()
        y = run(x)
        first = y.detach() if first is None else first
        y.square().mean().backward()
        optimiser.step()
    return first, [
        p.full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()
    ]


def batch():
    return torch.randn(8, 1, 6, 6, generator=torch.Generator().manual_seed(1))


def apart(rank, before):
    """What a network reads and converts by that was calibrated on each rank's own data, `before` it was distributed with the
    weights of another or after."""
    wires = {"r_wordline": 100.0, "r_bitline": 100.0}
    settings = {**SPECS["in situ"], **READS, "adc": {"bits": 8}, "parasitics": wires}
    torch.manual_seed(rank if before else 0)
    model, _ = gx.convert(nn.Linear(6, 4), gx.CrossbarSpec.model_validate(settings))
    gx.optim.InSituSGD(model.parameters(), lr=0.1)
    data = [torch.rand(9, 6, generator=torch.Generator().manual_seed(7 + rank))]
    x = torch.ones(2, 6)
    if before or rank == 0:
        gx.calibrate(model, data)
        model(x)
    run = gx.distribute(model)
    if not before:
        run(x)  # by ranges of rank 0 alone
        gx.calibrate(model, data)
    run(x)
    return [model.adc_range, model.seen]


def sharded(model):
    """A model whose parameters lie in shards on all ranks, those of each child together."""
    mesh = init_device_mesh("cpu", (2,))
    for part in (*model.children(), model):
        fully_shard(part, mesh=mesh)
    return model


def read_apart():
    """Read layers with weights that are computed or lent, which no rank shares with others."""
    pruned, lent = (
        gx.nn.AnalogLinear(6, 4, spec=gx.CrossbarSpec(read_noise={"sigma": 2e-7})) for _ in range(2)
    )
    prune.random_unstructured(pruned, "weight", 0.5)
    alone = "rows that draw read noise are this process's alone"
    with pytest.warns(RuntimeWarning, match=alone):
        pruned(batch())
    with pytest.warns(RuntimeWarning, match=alone):
        functional_call(lent, {"weight": 2 * lent.weight.detach()}, (batch(),))


def warn():
    """Of what some framework may share out, which no layer sees; not where nothing is trained or drawn, nor if distributed."""
    for kind, what in (("digital", "rows that draw read noise"), ("pulses", "pulse trains and bit streams")):
        model = network(kind)
        if kind == "pulses":
            gx.optim.InSituSGD(model.parameters(), lr=0.5)
        with pytest.warns(
            RuntimeWarning,
            match=rf"{what} are this process's alone, of 2 .*distribute\(model, wrap=False\)",
        ):
            model(batch())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model.eval()(batch())
            with torch.no_grad():
                model.train()(batch())
            gx.distribute(model, wrap=False)(batch())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        gx.convert(nn.Linear(6, 4), gx.CrossbarSpec())[0](torch.ones(2, 6))


def refuse_shards():
    """What ranks refuse of models that are sharded and not distributed, or the other way round, or in situ."""
    draws = r"rows that draw read noise must be those of all ranks, got .*distribute\(model, wrap=False\) before a framework or fully_shard"
    cpu = {"device_id": torch.device("cpu")}
    for shard in (
        sharded,
        *(
            lambda m, how=how: FullyShardedDataParallel(m, use_orig_params=how, **cpu)
            for how in (False, True)
        ),
    ):
        with pytest.raises(ValueError, match=draws):
            shard(network("digital"))(batch())
    quiet, _ = gx.convert(nn.Sequential(nn.Linear(6, 4)), gx.CrossbarSpec())
    sharded(quiet)(torch.ones(3, 6))
    whole = {
        "distribute": lambda model: gx.distribute(model, wrap=False),
        "calibrate": lambda model: gx.calibrate(model, [batch()]),
        "conversion_errors": lambda model: gx.conversion_errors(model, [batch()]),
        "program": gx.program,
    }
    for op, act in whole.items():
        plain = nn.Sequential(nn.Linear(6, 4))
        model = sharded(gx.convert(plain, gx.CrossbarSpec(adc={"bits": 8}))[0])
        text = rf"{op}: `model` must be whole, got shards of 0\.weight; call gpuxbar\.{op} before fully_shard, or on another"
        with pytest.raises(ValueError, match=text):
            act(model)
    shards = sharded(gx.convert(nn.Sequential(nn.Linear(6, 4)), gx.CrossbarSpec())[0])
    compiled = torch.compile(shards, backend="eager")  # whose names are not those that users know
    with pytest.raises(ValueError, match=r"program: `model` must be whole, got shards of 0\.weight; call"):
        gx.program(compiled)
    for distribute in (lambda model: model, lambda model: gx.distribute(model, wrap=False)):
        model = sharded(distribute(network("in situ")))
        with pytest.raises(
            ValueError, match=r"got none; .*shards \(use gpuxbar\.distribute in place of fully_shard\)"
        ):
            gx.optim.InSituSGD(model.parameters(), lr=0.5)


def programmed(rank):
    """What ranks read before and after they are distributed, of other devices each that have aged."""
    torch.manual_seed(rank)
    spec = gx.CrossbarSpec.model_validate({"seed": rank, "drift": {"nu": 0.1, "nu_std": 0.05}})
    model, _ = gx.convert(nn.Linear(6, 4), spec)
    gx.program(model)
    gx.age(model, "1d")
    x = torch.ones(2, 6)
    return [model(x).detach(), gx.distribute(model)(x).detach()]


def overflowing(rank):
    """Weights before and after two steps of a layer by pulse trains, the first with an error that is infinite on rank 1 alone; the
    scale after each."""
    torch.manual_seed(0)
    spec = gx.CrossbarSpec.model_validate({**READS, **SPECS["pulses"]})
    model, _ = gx.convert(nn.Linear(6, 4, bias=False), spec)
    run, optimiser = gx.distribute(model), gx.optim.InSituSGD(model.parameters(), lr=0.5)
    scaler, found = torch.amp.GradScaler("cpu", init_scale=8.0), [model.weight.detach().clone()]
    for factor in (float("inf") if rank else 1.0, 1.0):
        optimiser.zero_grad()
        scaler.scale(factor * run(torch.ones(3, 6)).sum()).backward()
        scaler.step(optimiser)
        scaler.update()
        found += [model.weight.detach().clone(), torch.tensor(scaler.get_scale())]
    return found


def work(rank, folder):
    torch.set_num_threads(1)
    if sys.platform == "linux":
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"  # wherever the machine's name leads
    store = f"file://{folder}/store"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    found = {}
    for kind in SPECS:
        model = network(kind)
        found[kind] = train(kind, model, gx.distribute(model), batch()[4 * rank : 4 * rank + 4])
        model = network(kind)
        run = DistributedDataParallel(Framed(gx.distribute(model, wrap=False)))
        found[f"{kind}, wrapped"] = train(kind, model, run, batch()[4 * rank : 4 * rank + 4])
    for kind in SHARDED:
        model = sharded(gx.distribute(network(kind), wrap=False))
        found[f"{kind}, sharded"] = train(kind, model, model, batch()[4 * rank : 4 * rank + 4])
    read_apart()
    warn()
    refuse_shards()
    own = [distributed.new_group([each]) for each in range(2)][rank]
    for kind in GROUPED:
        model = network(kind)
        found[f"{kind}, in a group"] = train(
            kind, model, gx.distribute(model, process_group=own), batch()[4 * rank :]
        )
        model = gx.distribute(network(kind), wrap=False, process_group=own)
        found[f"{kind}, in a group, unwrapped"] = train(kind, model, model, batch()[4 * rank :])
    model = network("digital")
    names = {buffer: name for name, buffer in model.named_buffers()}
    sent = [names[buffer] for buffer in gx.distribute(model).modules_buffers]
    were_apart = apart(rank, before=True) + apart(rank, before=False)
    aged, overflowed = programmed(rank), overflowing(rank)
    model = network("pulses")
    gx.optim.InSituSGD(model.parameters(), lr=0.5)
    with pytest.raises(
        ValueError, match=r"pulse trains and bit streams must be .*wrap it by gpuxbar\.distribute\(model\)"
    ):
        DistributedDataParallel(model)(batch())
    with pytest.raises(
        ValueError, match=r"rows that draw read noise must be .*distribute\(model, wrap=False\)"
    ):
        DistributedDataParallel(network("digital"))(batch())
    for part, noise in (("hh_l0", "sigma"), ("ih_l0", "sigma_g")):
        quiet, rule = (
            gx.CrossbarSpec.model_validate({**READS, "read_noise": {}}),
            {"read_noise": {noise: 1e-7}},
        )
        model, _ = gx.convert(nn.LSTM(6, 5), quiet, rules={part: rule})
        with pytest.raises(ValueError, match=f"{part}: rows that draw read noise must be"):
            DistributedDataParallel(model)(torch.ones(3, 2, 6))
    with pytest.raises(
        TypeError, match="options must be given to what wraps the model with wrap=False, got bucket_cap_mb"
    ):
        gx.distribute(network("digital"), wrap=False, bucket_cap_mb=1)
    torch.save((found, sent, were_apart, aged, overflowed), f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(work, (str(folder),), 2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


WAYS = [(kind, way) for kind in SPECS for way in ("", ", wrapped")] + [
    (kind, ", sharded") for kind in SHARDED
]


@pytest.mark.parametrize(("kind", "wrapped"), WAYS)
def test_ranks_train_as_one_process(ranks, kind, wrapped):
    model = network(kind)
    y, weights = train(kind, model, model, batch())
    parts = [found[kind + wrapped] for found, *_ in ranks]
    assert torch.equal(torch.cat([part for part, _ in parts]), y)  # noise included
    for one, two, alone in zip(parts[0][1], parts[1][1], weights, strict=True):
        assert torch.equal(one, two)
        torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("way", ["", ", unwrapped"])
@pytest.mark.parametrize("kind", GROUPED)
def test_a_rank_in_a_group_of_its_own_trains_as_one_process(ranks, kind, way):
    for rank, (found, *_) in enumerate(ranks):
        model = network(kind)
        y, weights = train(kind, model, model, batch()[4 * rank :])
        found_y, found_weights = found[f"{kind}, in a group{way}"]
        assert torch.equal(found_y, y)
        for one, alone in zip(found_weights, weights, strict=True):
            torch.testing.assert_close(one, alone, rtol=1e-5, atol=1e-6)


def test_what_follows_from_weights_is_not_sent(ranks):
    _, sent, *_ = ranks[0]
    assert "0.read_step" in sent
    assert not any(name.endswith(("cells", "full_pair", "written")) for name in sent)


def test_ranks_convert_and_read_alike_after_they_were_apart(ranks):
    for one, two in zip(ranks[0][2], ranks[1][2], strict=True):
        assert torch.equal(one, two)


def test_programmed_devices_are_those_of_the_first_rank(ranks):
    (first, distributed_first), (other, distributed_other) = (rank[3] for rank in ranks)
    assert torch.equal(distributed_first, first)
    assert torch.equal(distributed_other, first)
    assert not torch.equal(other, first)


def test_all_ranks_leave_out_a_step_that_overflows_on_one(ranks):
    first, other = (rank[4] for rank in ranks)
    for one, two in zip(first, other, strict=True):
        assert torch.equal(one, two)
    before, skipped, halved, moved, scale = first
    assert torch.equal(skipped, before)
    assert (halved, scale) == (4.0, 4.0)
    assert not torch.equal(moved, before)


def test_it_needs_a_process_group():
    with pytest.raises(ValueError, match=r"torch\.distributed must be initialised, got no process group"):
        gx.distribute(network("digital"))
