"""What is refused leaves a model as it was, however many of its layers it is about."""

import copy
import re

import pytest
import torch
from torch import nn

import gpuxbar as gx
from gpuxbar.spec import ConstantStep

TRAINED = {"update": ConstantStep()}


def model(**settings):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    return gx.convert(plain, gx.CrossbarSpec(**settings))[0].eval()


def refused(model, error, text, act):
    """The model stays as it was."""
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(error, match=text):
        act()
    after = model.state_dict()
    assert after.keys() == before.keys()
    torch.testing.assert_close(dict(after), before, rtol=0, atol=0, equal_nan=True)


def spoil(layer):
    with torch.no_grad():
        layer.weight[0, 0] = float("nan")


def test_no_layer_is_programmed_where_one_cannot_be():
    network = model()
    spoil(network[1])
    refused(network, gx.ops.NotFiniteError, "1: `weight` must be finite", lambda: gx.program(network))


def test_no_layer_ages_where_the_test_read_of_one_is_refused():
    network = model(parasitics={"r_wordline": 1.0}, drift={"nu": 0.05})
    gx.program(network)
    gx.age(network, "1h", compensate=True)
    x = torch.ones(2, 4)
    y = network[0](x)
    spoil(network[1])
    refused(
        network, ValueError, "1: `weight` must stay as it was", lambda: gx.age(network, "1y", compensate=True)
    )
    assert torch.equal(network[0](x), y)


def test_no_layer_trains_in_situ_where_a_later_group_is_wrong():
    network = model(**TRAINED)
    first, second = ({"params": [*layer.parameters()]} for layer in network)
    several = torch.tensor([0.1, 0.2])
    wrong = (-1.0, ValueError), ("fast", TypeError), (several, TypeError), (several.numpy(), TypeError)
    for rate, error in wrong:
        refused(
            network, error, re.escape(f"InSituSGD: `lr` must be above 0, got {rate!r}; try 0.05"),
            lambda rate=rate: gx.optim.InSituSGD([first, {**second, "lr": rate}], lr=0.1),
        )  # fmt: skip
    refused(
        network, ValueError, "TikiTaka: `zero_shift` must be a whole number of at least 0, got 1.5",
        lambda: gx.optim.TikiTaka(network.parameters(), lr=0.1, zero_shift=1.5),
    )  # fmt: skip
    gx.optim.InSituSGD([first, second], lr=0.1)
    assert network[0].in_situ
    assert network[1].in_situ


class Dead(nn.Module):
    """Nothing drives the second layer."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network[1](0 * self.network[0](x))


def test_no_range_begins_where_another_cannot():
    network = Dead(model(dac={"bits": 8, "range": "learned"}, adc={"bits": 8}))
    refused(
        network, ValueError, "1: a DAC range that is learned must begin on inputs that are not all zeros",
        lambda: gx.calibrate(network, [torch.randn(8, 4)]),
    )  # fmt: skip
    assert not network.network[0].dac_begun


def programmed(**settings):
    network = model(**settings)
    gx.program(network)
    return network


def trained(**settings):
    network = model(**TRAINED, **settings)
    gx.optim.InSituSGD(network.parameters(), lr=0.1)
    return network


@pytest.mark.parametrize("make", [programmed, trained])
def test_a_layer_holds_no_devices_of_a_state_that_does_not_fit(make):
    """Which another part of the state dict would otherwise be read with."""
    state = make().state_dict()
    name = "0.g_programmed" if make is programmed else "0.g_cells"
    state[name] = torch.zeros(2, 2, 3)
    network = model(**TRAINED)
    y = network(torch.ones(2, 4))
    with pytest.raises(RuntimeError, match=f"size mismatch for {name}"):
        network.load_state_dict(state)
    assert not network[0].programmed
    assert not network[0].in_situ
    with torch.no_grad():
        assert network(torch.ones(2, 4)).shape == y.shape


def test_a_programmed_layer_does_not_read_its_devices_as_those_of_another_weight():
    """Which a state dict left it whose devices do not fit."""
    network, state = programmed(), programmed().state_dict()
    state["0.weight"] = state["0.weight"] + 1
    state["0.g_programmed"] = torch.zeros(2, 2, 3)
    with pytest.raises(RuntimeError, match=r"size mismatch for 0\.g_programmed"):
        network.load_state_dict(state)
    with pytest.raises(ValueError, match="0: `weight` must stay as it was"):
        network(torch.ones(2, 4))


@pytest.mark.parametrize(
    ("make", "missing"),
    [(programmed, "age"), (programmed, "g_programmed"), (programmed, "written_as"), (trained, "w_max")],
)
def test_a_state_that_lacks_a_part_of_its_devices_is_refused(make, missing):
    state = make().state_dict()
    del state[f"1.{missing}"]
    with pytest.raises(
        ValueError, match=f"1: `state_dict` must hold all of a .*, got one that lacks {missing}"
    ):
        model(**TRAINED).load_state_dict(state, strict=False)


def trained_and_programmed(**settings):
    network = trained(**settings)
    gx.program(network)
    return network


@pytest.mark.parametrize("settings", [{}, {"device": {"g_min": 1e-6, "g_max": 2e-5}}])
def test_a_layer_holds_no_cells_of_a_state_whose_programmed_devices_are_refused(settings):
    """Which in-situ training would otherwise go on from."""
    state = trained_and_programmed().state_dict()
    if not settings:
        del state["0.age"]
    network = model(**TRAINED, **settings)
    with pytest.raises(ValueError, match="0: `state_dict` must"):
        network.load_state_dict(state, strict=False)
    assert not network[0].in_situ
    gx.optim.InSituSGD(network.parameters(), lr=0.1)
    assert torch.equal(network[0].w_max, trained(**settings)[0].w_max)


@pytest.mark.parametrize("name", ["written_as", "device_seed", "chip", "measured", "age", "gain", "ageings"])
def test_a_layer_holds_no_devices_whose_time_does_not_fit(name):
    state = programmed().state_dict()
    state[f"0.{name}"] = torch.cat([state[f"0.{name}"]] * 2)
    network = model()
    with pytest.raises((RuntimeError, ValueError), match=r"size mismatch for 0\.|argument 2 is longer"):
        network.load_state_dict(state)
    assert not network[0].programmed
    network(torch.ones(2, 4))


@pytest.mark.parametrize("make", [programmed, trained])
def test_states_may_come_in_parts_to_a_layer_that_holds_devices(make):
    """As large checkpoints do, which are cut anywhere."""
    source, x = make(), torch.ones(2, 4)
    with torch.no_grad():
        source[0].weight.mul_(0.5)
    if make is programmed:
        gx.program(source)
        gx.age(source, "1d")
    else:
        source[0].begin_in_situ()
    state = [*source.state_dict().items()]
    for cut in range(1, len(state)):
        network = make()
        for part in (state[:cut], state[cut:]):
            network.load_state_dict(dict(part), strict=False)
        for name, value in state:
            assert torch.equal(network.state_dict()[name], value), (cut, name)
        assert torch.equal(network(x), copy.deepcopy(source)(x))


def test_devices_of_before_their_seed_was_saved_are_those_of_the_layer():
    source = programmed(drift={"nu": 0.05})
    state = source.state_dict()
    for name in ("0.device_seed", "1.device_seed"):
        del state[name]
    network = model(drift={"nu": 0.05})
    network.load_state_dict(state, strict=False)
    assert torch.equal(network(torch.ones(2, 4)), source(torch.ones(2, 4)))
