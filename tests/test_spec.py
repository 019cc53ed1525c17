"""Specs: files, presets, and one line a wrong setting."""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch

import gpuxbar as gx
from gpuxbar.spec import ADC, DAC, Agarwal, Carry, NeuroSim, SoftBounds, parse_value
from gpuxbar.spec.presets import PRESETS, preset

CHANGED = {
    "tile": {"rows": 61, "cols": 67},
    "device": {"g_min": 1.7e-9, "g_max": 3.3e-7},
    "mapping": {"scheme": "subtracted", "scale": "column"},
    "dac": {"bits": 6, "stream_bits": 2, "range": "fixed", "max": 1.5},
    "adc": {"bits": 5, "range": "fixed", "i_max": 1e-20, "per": "column", "gain_std": 0.1},
    "read_noise": {"sigma": 1e-6 / 3.0, "sigma_g": 1e-300},
    "programming": {"write_noise": 1e-8, "stuck_at_g_min": 0.01},
    "backward": {"dac": {"bits": 3}, "adc": {"bits": 4}},
    "seed": 2**63 - 1,
    "generator": "fast",
}
SLICED = {"update": {"law": "agarwal"}, "mapping": {"slices": 2, "slice_bits": 2}, "carry": {"interval": 7}}


@pytest.mark.parametrize("law", [None, Agarwal(nu=0.1), NeuroSim(levels=3), SoftBounds(down=1.2)])
def test_a_saved_spec_is_loaded_bit_for_bit(tmp_path, law):
    spec = gx.CrossbarSpec(**CHANGED, update=law)
    gx.save_spec(spec, tmp_path / "spec.yaml")
    assert gx.load_spec(tmp_path / "spec.yaml") == spec
    assert gx.load_spec(str(tmp_path / "spec.yaml")) == spec


def test_a_carry_is_saved():
    spec = gx.CrossbarSpec.model_validate(SLICED)
    assert gx.CrossbarSpec.model_validate_json(spec.model_dump_json()) == spec
    assert spec.carry == Carry(interval=7)
    assert spec.carry.window(2) == 15


def test_a_spec_survives_copies():
    spec = gx.CrossbarSpec(**CHANGED)
    assert copy.deepcopy(spec) == spec == pickle.loads(pickle.dumps(spec))
    assert spec.with_overrides({"adc": {"bits": 6}}).adc.bits == 6
    with pytest.raises(
        TypeError, match="CrossbarSpec: `overrides` must be a dict of settings by name, got list; for"
    ):
        spec.with_overrides(["adc.bits=6"])
    assert spec.adc.bits == 5


def test_a_spec_shows_what_differs_from_the_defaults():
    assert str(gx.CrossbarSpec()) == "CrossbarSpec()"
    shown = str(gx.presets.demo())
    assert shown == (
        "CrossbarSpec(mapping=Mapping(scheme='subtracted'), dac=DAC(bits=8), adc=ADC(bits=8, percentile=100.0), "
        "read_noise=ReadNoise(sigma=2e-08), update=Agarwal(nu=0.1, gamma=0.02, cycle=0.1))"
    )
    assert repr(gx.CrossbarSpec(**gx.CrossbarSpec().model_dump())) == "CrossbarSpec()"


def test_files_may_be_partial_and_write_numbers_as_people_do(tmp_path):
    (tmp_path / "a.yaml").write_text("device: {g_max: 2e-5}\nread_noise:\n  sigma: 1E-6\n")
    spec = gx.load_spec(tmp_path / "a.yaml")
    assert spec == gx.CrossbarSpec(device={"g_max": 2e-5}, read_noise={"sigma": 1e-6})
    (tmp_path / "b.yaml").write_text("{}")
    assert gx.load_spec(tmp_path / "b.yaml") == gx.CrossbarSpec()


@pytest.mark.parametrize(
    ("text", "value"),
    [("6", 6), ("1e-6", 1e-6), ("null", None), ("true", True), ("offset", "offset"), ("nan", "nan")],
)
def test_values_of_a_command_line(text, value):
    parsed = parse_value(text)
    assert parsed == value or text == "nan"
    assert type(parsed) is type(value) or text == "nan"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"adc": {"bit": 6}}, "CrossbarSpec: `adc.bit` must be a known key; did you mean `bits`?"),
        (
            {"zzz": 1},
            "CrossbarSpec: `zzz` must be a known key; known: tile, device, mapping, dac, adc, read_noise, "
            "programming, parasitics, backward, update, carry, pulses, ...",
        ),
        (
            {"backward": {"adc": {"bits": 17}}},
            "CrossbarSpec: `backward.adc.bits` must be an integer from 1 to 16, or null, got 17; "
            "the default is null",
        ),
        (
            {"tile": {"rows": 1.5}},
            "CrossbarSpec: `tile.rows` must be an integer from 1 to 65536, got 1.5; the default is 128",
        ),
        (
            {"dac": {"signed": "maybe"}},
            "CrossbarSpec: `dac.signed` must be true or false, got 'maybe'; the default is true",
        ),
        (
            {"dac": {"v_read": 0}},
            "CrossbarSpec: `dac.v_read` must be a finite number above 0, got 0; the default is 0.2",
        ),
        (
            {"adc": {"percentile": 101}},
            "CrossbarSpec: `adc.percentile` must be a finite number above 0 and up to 100, got 101; "
            "the default is 99.99",
        ),
        (
            {"read_noise": {"sigma": float("nan")}},
            "CrossbarSpec: `read_noise.sigma` must be a finite number of at least 0, got nan; the default is 0.0",
        ),
        (
            {"read_noise": {"sigma": 0.0003}, "tile": {"cols": 512}},
            "CrossbarSpec: `read_noise.sigma` must be at most 0.000256 A, what all cells of a bitline carry, got 0.0003 A; give it in A, "
            "not as a share",
        ),
        (
            {"read_noise": {"sigma_g": 1.01e-5}},
            "CrossbarSpec: `read_noise.sigma_g` must be at most 1e-05 S, the device.g_max, got 1.01e-05 S; give it in S, not as a share",
        ),
        (
            {"programming": {"write_noise": 0.05}},
            "CrossbarSpec: `programming.write_noise` must be at most 1e-05 S, the device.g_max, got 0.05 S; give it in S, not as a share",
        ),
        (
            {"update": {"law": "constant_step", "write_noise": 0.01}},
            "CrossbarSpec: `update.write_noise` must be at most 1e-05 S, the device.g_max, got 0.01 S; give it in S, not as a share",
        ),
        (
            {"device": {"g_min": 1, "g_max": 10}, "parasitics": {"r_wordline": 1.0}},
            "CrossbarSpec: `parasitics.r_wordline` must be at most 0.1 ohm, which a device at device.g_max has, got 1 ohm between two "
            "cells; give wires in ohm and devices in S",
        ),
        (
            {"parasitics": {"r_bitline": 1.01e5}},
            "CrossbarSpec: `parasitics.r_bitline` must be at most 100000 ohm, which a device at device.g_max has, got 101000 ohm between "
            "two cells; give wires in ohm and devices in S",
        ),
        (
            {"mapping": {"scheme": "ofset"}},
            "CrossbarSpec: `mapping.scheme` must be differential or subtracted or offset, got 'ofset'; "
            "did you mean `offset`?",
        ),
        (
            {"generator": 7},
            "CrossbarSpec: `generator` must be exact or fast, got 7; choose one of these",
        ),
        (
            {"device": {"g_min": 1}},
            "CrossbarSpec: `device`: `g_min` must be below `g_max`, got 1 S and 1e-05 S; "
            "swap them or widen the window",
        ),
        (
            {"update": {"law": "agarwal"}, "mapping": {"slices": 2, "slice_bits": 2}},
            "CrossbarSpec: `carry` must say how 2 slices are updated, got None; set carry={'scheme': 'accumulate'}, or use "
            "mapping.slices=1 or update=None",
        ),
        (
            {"update": {"law": "agarwal"}, "mapping": {"scheme": "offset"}},
            "CrossbarSpec: `update` must go with pairs, got scheme='offset'; use mapping.scheme='differential' or "
            "'subtracted', or update=None",
        ),
        (
            {"update": {"law": "soft_bounds", "reference_at": 0.4}},
            "CrossbarSpec: `update`: `sides` must be reference with reference_at, got 'both'; choose it, or leave reference_at None",
        ),
        (
            {**SLICED, "update": {"law": "agarwal", "sides": "reference", "reference_at": 0.4}},
            "CrossbarSpec: `update.reference_at` must be None for sliced weights, got 0.4; their digits lie half on either device: "
            "leave it out, or use mapping.slices=1 and slice_bits=None",
        ),
        (
            {"update": {"law": "agarwal"}, "carry": {}},
            "CrossbarSpec: `carry` must go with an update law and sliced weights, got update='agarwal' with 1 slice; set "
            "both, or carry=None",
        ),
        (
            {"carry": {}, "mapping": {"slices": 2, "slice_bits": 2}},
            "CrossbarSpec: `carry` must go with an update law and sliced weights, got update=None with 2 slices; set both, "
            "or carry=None",
        ),
        (
            {**SLICED, "device": {"levels": 4}},
            "CrossbarSpec: `device.levels` must be None for sliced weights that are trained in situ, got 4; updates leave devices "
            "between levels",
        ),
        (
            {**SLICED, "update": {"law": "constant_step"}, "pulses": {}},
            "CrossbarSpec: `carry.scheme` must be periodic with pulse trains, got 'accumulate': coincidences count a product "
            "out and cut no digits of it; choose it, or update without pulses",
        ),
        (
            {**SLICED, "carry": {"scheme": "periodic", "input_bits": 4}},
            "CrossbarSpec: `carry`: `input_bits` must be left out without scheme='streamed', got 4 for 'periodic'; only there inputs go bit by "
            "bit",
        ),
        (
            {**SLICED, "carry": {"scheme": "streamed", "input_bits": 9}},
            "CrossbarSpec: `carry.input_bits` must be an integer from 1 to 8, got 9; the default is 8",
        ),
        (
            {
                **SLICED,
                "carry": {"scheme": "streamed"},
                "parasitics": {"r_wordline": 1.0, "gradient": "exact"},
            },
            "CrossbarSpec: `parasitics.gradient` must be straight_through with carry.scheme='streamed', got 'exact'; inputs "
            "and errors are multiplied in the array and make no gradient: choose it, or carry.scheme='accumulate'",
        ),
        (
            {**SLICED, "update": {"law": "constant_step"}, "carry": {"scheme": "streamed"}, "pulses": {}},
            "CrossbarSpec: `carry.scheme` must be periodic with pulse trains, got 'streamed': coincidences count a product "
            "out and cut no digits of it; choose it, or update without pulses",
        ),
        (
            {**SLICED, "carry": {"interval": 0}},
            "CrossbarSpec: `carry.interval` must be an integer from 1 and below 2147483648, got 0; the default is 64",
        ),
        (
            {"update": {"law": "agarwal"}, "refresh": {"interval": 10}},
            "CrossbarSpec: `update.sides` must be one_sided with refresh.interval, got 'both'; only such pairs fill up: choose it, "
            "or refresh.interval=None",
        ),
        (
            {"refresh": {"interval": 10}},
            "CrossbarSpec: `update.sides` must be one_sided with refresh.interval, got no law; only such pairs fill up: choose it, "
            "or refresh.interval=None",
        ),
        (
            {**SLICED, "update": {"law": "agarwal", "sides": "one_sided"}, "refresh": {"interval": 10}},
            "CrossbarSpec: `refresh.interval` must be None for 2 slices, got 10; carries write pairs anew of which both devices "
            "have gained a unit",
        ),
        (
            {"refresh": {"interval": 0}},
            "CrossbarSpec: `refresh.interval` must be an integer from 1 and below 2147483648, or null, got 0; the default is null",
        ),
        (
            {"update": {"law": "agarwl"}},
            "CrossbarSpec: `update.law` must be a known law, got 'agarwl'; did you mean `agarwal`?",
        ),
        (
            {"update": {"nu": 1}},
            "CrossbarSpec: `update` must name its law, got {'nu': 1}; add `law`: agarwal, agarwal_symmetric, "
            "constant_step, exponential_step, ideal, linear_step, lookup_table, neurosim, piecewise_step, power_step, soft_bounds",
        ),
        (
            {"update": {"law": "agarwal", "nuu": 1}},
            "CrossbarSpec: `update.nuu` must be a known key; did you mean `nu`?",
        ),
        (
            {"adc": 5},
            "CrossbarSpec: `adc` must hold settings by name, got 5; known: bits, range, i_max, percentile, per, "
            "gain_std, offset_std, inl, inl_std",
        ),
    ],
)
def test_a_wrong_setting_is_one_line(settings, message, tmp_path):
    with pytest.raises(gx.SpecError) as caught:
        gx.CrossbarSpec.model_validate(settings)
    assert str(caught.value) == message
    with pytest.raises(gx.SpecError) as caught:
        gx.CrossbarSpec(**settings)
    assert str(caught.value) == message
    with pytest.raises(gx.SpecError) as caught:
        gx.CrossbarSpec().with_overrides(settings)
    assert str(caught.value) == message


WIRES = {"r_wordline": 1.0}
IN_SITU = {"update": {"law": "constant_step"}}
MEASURED = {"law": "measured", "ages": [1], "shares": [0, 1], "shift": [[0, 0]], "std": [[0, 0]]}


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({**IN_SITU, "mapping": {"slice_bits": 1}, "device": {"levels": 2}}, "`device.levels` must be None for sliced weights that are"),
        ({"mapping": {"slice_bits": 2}, "device": {"levels": 3}}, "`device.levels` must be 2**slice_bits = 4 for sliced weights, got 3"),
        ({"mapping": {"slices": 2}}, "`mapping`: `slice_bits` must be set for 2 slices, got None"),
        ({"mapping": {"slices": 9, "slice_bits": 4}}, "`mapping`: slices * slice_bits must be at most 32, got 9 * 4"),
        ({"mapping": {"scheme": "offset"}, "device": {"levels": 2}}, "`device.levels` must be at least 3 with"),
        ({"mapping": {"scheme": "offset", "slice_bits": 2}}, "`mapping`: `scheme` must be differential or subtracted"),
        ({"mapping": {"line_order": "nhwc"}}, "`mapping.line_order` must be channel_position or position_channel, got 'nhwc'"),
        ({"update": {"law": "ideal", "integer_pulses": True}}, "`update`: `integer_pulses` must be false, got true"),
        ({"pulses": {}}, "`law` must be one with pulses to follow a pulse train, got none"),
        ({"update": {"law": "power_step"}, "pulses": {"mode": "aggregated"}}, "`mode` must be exact for law='power_step'"),
        ({"pulses": {"length": 32}}, "`pulses.length` must be an integer from 1 to 31, got 32"),
        ({"update": {"law": "lookup_table"}}, "`update.scatter_down` must be given, got none; see help(LookupTable)"),
        ({"update": {"law": "exponential_step", "a": 0}}, "`update`: `a` must be at least 0.001 in size, got 0"),
        ({"update": {"law": "piecewise_step", "up": [1, 1, 1, 1]}}, "`update`: `up` must hold 2, 3, 5 or 9 values, got 4"),
        ({"update": {"law": "piecewise_step", "down": [1, -1]}}, "`update`: `down` must hold steps of 0 to 1000 nominal ones, got [1.0, -1.0]"),
        ({1: 2}, "`1` must be valid, got 1; Keys should be strings"),
        ({"adc": {"gain_std": 0.1}}, "`adc`: `bits` must be set with converter errors, got None with gain_std=0.1, offset_std=0, inl=0, inl_std=0"),
        ({"adc": {"bits": 8, "inl": -22}}, "`adc`: `inl` must be within +-21.3333 steps, a twelfth of the codes of 8 bits, got -22"),
        ({"adc": {"bits": 8, "inl_std": 22}}, "`adc`: `inl_std` must be within +-21.3333 steps, a twelfth of the codes of 8 bits, got 22"),


        ({"adc": {"bits": 1}}, "`adc.bits` must be at least 2 where currents have both signs, got 1; add a bit"),
        ({"adc": {"bits": 1}, "dac": {"bits": 4, "signed": False}}, "`backward.adc.bits` must be at least 2 where currents have both signs"),
        ({"backward": {"adc": {"bits": 1}}}, "as gradients make them, got 1; give it, or backward.mode='ideal'"),
        ({"dac": {"bits": 1}}, "`dac`: `bits` must be 2 to 8 for signed inputs, got 1; one bit holds no sign"),
        ({"dac": {"stream_bits": 2}}, "`dac`: `bits` must be set with `stream_bits`, got None; streams of 2 bits"),
        ({"dac": {"polarity": "two_phase"}, "adc": {"bits": 8}}, "`dac`: `bits` must be set with polarity='two_phase'"),
        ({"backward": {"dac": {"signed": False, "bits": 8}}}, "`backward.dac.signed` must be true, got false"),
        ({"parasitics": {"r_bitline": -1.0}}, "`parasitics.r_bitline` must be a finite number of at least 0"),
        ({"parasitics": {"r_source": 5.0}}, "`parasitics`: `terminations` must be chosen where r_source and r_sink differ, got 5 and 0 ohm"),
        ({"parasitics": WIRES, "mapping": {"scheme": "offset"}}, "`mapping.scheme` must be differential or subtracted with parasitics, got 'offset'"),
        ({"parasitics": {"refresh_interval": 4}}, "`parasitics`: `anchor` must be ladder or mean_field with refresh_interval 4, got None"),
        ({"parasitics": {"anchor": "ladder", "method": "ladder"}}, "`anchor` must go with method='exact' and shared_drivers=False, got 'ladder' and False"),
        ({"parasitics": {"anchor": "ladder", "shared_drivers": True}}, "`anchor` must go with method='exact' and shared_drivers=False, got 'exact' and True"),
        ({"parasitics": {"shared_drivers": True, "method": "ladder"}}, "`shared_drivers` must go with method='exact'"),
        ({"parasitics": {"gradient": "exact", "method": "ladder"}}, "`gradient` must be straight_through unless method='exact' and shared_drivers=False, got 'exact' with 'ladder'"),
        ({"parasitics": {"gradient": "exact", "shared_drivers": True}}, "got 'exact' with 'exact' and True; choose these or gradient='straight_through'"),
        ({**IN_SITU, "parasitics": {**WIRES, "gradient": "exact"}, "pulses": {}}, "`parasitics.gradient` must be straight_through with pulses, got 'exact'"),
        ({"programming": {"write_noise": [1e-7, -3e-7, 1e-7]}}, "`programming`: `write_noise` must be at least 0 for every r of 0 to 1, got -1e-07 S at r = 1"),
        ({"programming": {"write_noise": -1e-6}}, "`write_noise` must be at least 0 for every r of 0 to 1, got -1e-06 S at r = 0; it is a standard deviation"),
        ({"programming": {"write_noise": [5.25e-9, -5e-8, 1e-7]}}, "got -1e-09 S at r = 0.25; it is a standard deviation"),
        ({"programming": {"write_noise": []}}, "`write_noise` must be a number or have 1 to 5 terms, got 0"),
        ({"programming": {"write_noise": [1e-8] * 6}}, "`write_noise` must be a number or have 1 to 5 terms, got 6; a polynomial"),
        ({"programming": {"write_noise": [0, 4e-5, -4e-5]}, "device": {"g_max": 9e-6}}, "`programming.write_noise` must be at most 9e-06 S, the device.g_max, got 1e-05 S"),
        ({"programming": {"write_noise": "small"}}, "`programming.write_noise` must be a finite number, got 'small'"),
        ({"dac": {"bits": 8}, "backward": {"dac": {"range": "sample"}}},
         "`backward.dac.bits` must be given with other settings of that converter, got none; give 8, as forwards, or null to leave it out"),
        ({"adc": {"bits": 6}, "backward": {"adc": {"range": "worst_case"}}}, "`backward.adc.bits` must be given with other settings of that converter, got none; give 6, as forwards"),
        ({"drift": {"law": "measured"}}, "`drift.ages` must be given, got none; see help(MeasuredDrift)"),
        ({"drift": {"law": "measure", "ages": [1]}}, "`drift.law` must be a known law, got 'measure'; did you mean `measured`?"),
        ({"drift": {"law": "measured", "ages": [3, 1], "shares": [0, 1], "shift": [], "std": []}}, "`drift`: `ages` must be one or more that rise from above 0 s, got (3.0, 1.0)"),
        ({"drift": {"law": "measured", "ages": [0, 1], "shares": [0, 1], "shift": [], "std": []}}, "`drift`: `ages` must be one or more that rise from above 0 s, got (0.0, 1.0)"),
        ({"drift": {"law": "measured", "ages": [], "shares": [0, 1], "shift": [], "std": []}}, "`drift`: `ages` must be one or more that rise from above 0 s, got ()"),
        ({"drift": {"law": "measured", "ages": [1], "shares": [0], "shift": [[0]], "std": [[0]]}}, "`drift`: `shares` must be 2 to 32 that rise by more than 1e-4 within 0 to 1, got (0.0,)"),
        ({"drift": {"law": "measured", "ages": [1], "shares": [0, 1.1], "shift": [[0, 0]], "std": [[0, 0]]}}, "within 0 to 1, got (0.0, 1.1)"),
        ({"drift": {"law": "measured", "ages": [1], "shares": [0, 1], "shift": [[0, 0]], "std": [[0]]}}, "`drift`: `std` must have 1 rows of 2, for each age a value for each share, got rows of [1]"),
        ({"drift": {"law": "measured", "ages": [1], "shares": [0, 1], "shift": [[0, 0]], "std": [[0, -1e-9]]}}, "`drift`: `std` must be at least 0, got -1e-09 S"),
        ({"drift": MEASURED | {"shares": [-0.1, 1]}}, "within 0 to 1, got (-0.1, 1.0)"),
        ({"drift": MEASURED | {"shares": [0, 1e-4]}}, "that rise by more than 1e-4 within 0 to 1, got (0.0, 0.0001)"),
        ({"drift": MEASURED | {"shares": [i / 32 for i in range(33)]}}, "`drift`: `shares` must be 2 to 32 that rise"),
        ({"drift": MEASURED | {"shift": [[0], [0]]}}, "`drift`: `shift` must have 1 rows of 2, for each age a value for each share, got rows of [1, 1]"),
        ({"drift": MEASURED | {"shift": [[0, -0.1]]}}, "`drift.shift` must be at most 1e-05 S, the device.g_max, got 0.1 S; give it in S"),
        ({"drift": MEASURED | {"std": [[0, 0.1]]}}, "`drift.std` must be at most 1e-05 S, the device.g_max, got 0.1 S; give it in S"),
        ({"drift": MEASURED | {"ages": 1}}, "`drift.ages` must be a list, got 1; see help(MeasuredDrift)"),
        ({"drift": MEASURED | {"shift": [0, 0]}}, "`drift.shift.0` must be a list, got 0; see help(MeasuredDrift)"),
        ({"drift": MEASURED | {"ages": ["1h"]}}, "`drift.ages.0` must be a finite number, got '1h'; see help(MeasuredDrift)"),
        ({"drift": {"ages": [1]}}, "`drift.ages` must be a known key; law='measured' has it"),
        ({"drift": MEASURED | {"age": [1]}}, "`drift.age` must be a known key; did you mean `ages`?"),
        ({"drift": "measured"}, "`drift` must name its law, got 'measured'; add `law`: power, measured"),
        ({"update": {"law": "soft_bounds", "scatter_up": []}}, "`update.scatter_up` must be a known key; law='lookup_table' has it"),
        ({"programming": {"device_spread": float("nan")}}, "`programming.device_spread` must be a finite number of at least 0, got"),
        ({"programming": {"stuck_at_g_min": 0.6, "stuck_at_g_max": 0.5}},
         "`programming`: stuck_at_g_min + stuck_at_g_max must be at most 1, got 0.6 + 0.5; they are shares of the cells"),
        ({"drift": {"nu_min": 0.2, "nu_max": 0.1}}, "`drift`: `nu_min` must be at most nu_max, got 0.2 and 0.1"),
        ({"drift": {"t_read": 30.0}}, "`drift`: `t_read` must be at most t_0, got 30 s and 20 s"),
        ({"retention": {"tau": 1e7}}, "`retention`: `step_time` must be at least a millionth of tau, got 1 s for 1e+07 s; leave"),
        ({"retention": {"tau": 0}}, "`retention.tau` must be a finite number above 0, or null, got 0"),
        ({"retention": {"tau": 10}}, "`update` must be a law where devices lose what they were trained to (retention.tau), got None; choose"),
        ({"retention": {"tau": 10, "g_rest": 0.1}, "update": {"law": "ideal"}},
         "`retention.g_rest` must be at most 1e-05 S, the device.g_max, got 0.1 S; give it in S, not as a share"),
        ({"endurance": {"pulses": 10}}, "`update` must be a law with pulses where endurance counts them, got None; choose"),
        ({"endurance": {"pulses": 10}, "update": {"law": "ideal"}}, "where endurance counts them, got 'ideal'"),
        ({"endurance": {"failed": "g_mx"}}, "`endurance.failed` must be held or g_min or g_max, got 'g_mx'; did you mean `g_max`?"),
        ({"endurance": {"pulses": 1e12}}, "`endurance.pulses` must be a finite number above 0 and up to 1000000000.0, or null, got 1000000000000.0"),
    ],
)  # fmt: skip
def test_settings_that_do_not_fit_are_named(settings, text):
    with pytest.raises(gx.SpecError, match=re.escape(text)):
        gx.CrossbarSpec.model_validate(settings)


def test_one_bit_converts_currents_of_one_sign():
    dac, adc = {"bits": 4, "signed": False}, {"bits": 1, "range": "worst_case"}
    layer = torch.nn.Linear(8, 3, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0], [-1.0], [0.3]]).expand(3, 8))
    model, _ = gx.convert(
        layer, gx.CrossbarSpec.model_validate({"dac": dac, "adc": adc, "backward": {"mode": "ideal"}})
    )
    full = 8 * 1e-5 / 9e-6  # of either array
    torch.testing.assert_close(model(torch.ones(1, 8)).detach(), torch.tensor([[full, -full, 0.0]]))


def test_every_wrong_setting_has_its_line_and_parts_speak_for_themselves():
    with pytest.raises(gx.SpecError) as caught:
        DAC(bits=99, v_read="x")
    assert str(caught.value).splitlines() == [
        "DAC: `bits` must be an integer from 1 to 8, or null, got 99; the default is null",
        "DAC: `v_read` must be a finite number above 0, got 'x'; the default is 0.2",
    ]
    with pytest.raises(gx.SpecError, match=r"^ADC: `i_max` goes with range='fixed' and only with it"):
        ADC(range="fixed")


def test_a_spec_is_not_changed_but_made_anew():
    spec = gx.CrossbarSpec(adc={"bits": 8})
    with pytest.raises(gx.SpecError) as caught:
        spec.tile.rows = 64
    assert str(caught.value) == (
        "Tile: `rows` must stay as it was made, got 64; make another spec, with {'rows': 64} under this part's key in "
        "spec.with_overrides"
    )
    with pytest.raises(gx.SpecError) as caught:
        spec.seed = 6
    assert str(caught.value) == (
        "CrossbarSpec: `seed` must stay as it was made, got 6; make another spec, by spec.with_overrides({'seed': 6})"
    )
    with pytest.raises(
        gx.SpecError, match=r"^ADC: `bits` must stay as it was made, got del; make another spec without it"
    ):
        del spec.adc.bits
    assert spec.adc.bits == 8
    assert copy.deepcopy(spec) == pickle.loads(pickle.dumps(spec)) == spec.model_copy() == spec


def test_ranges_that_are_learned_round_inputs():
    with pytest.raises(
        gx.SpecError,
        match=r"^DAC: `max` goes with range='fixed', which needs it, or 'learned', got range='ema'",
    ):
        DAC(range="ema", max=1.0)
    with pytest.raises(gx.SpecError, match=r"^DAC: `bits` must be set with range='learned', got None"):
        DAC(range="learned")
    with pytest.raises(gx.SpecError, match=r"^CrossbarSpec: `backward.dac.range` must be .*, got 'learned'"):
        gx.CrossbarSpec(backward={"dac": {"bits": 8, "range": "learned"}})
    learned = gx.CrossbarSpec(dac={"bits": 8, "range": "learned", "max": 3.0})
    assert (learned.backward_dac.range, learned.backward_dac.max) == ("tensor", None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("adc: {bit: 6}", "bad.yaml: CrossbarSpec: `adc.bit` must be a known key; did you mean `bits`?"),
        ("adc: [", "bad.yaml, line 1, column 7: must be YAML, got: "),
        ("seed: 2020-13-45", "bad.yaml: must be YAML, got: month must be in 1..12; correct the line"),
        ("adc: " + 3000 * "[" + 3000 * "]", "bad.yaml: must be YAML, got: maximum recursion depth exceeded"),
        (
            "seed: 1\ntile: {}\nseed: 2\n",
            "bad.yaml, line 3, column 1: must be YAML, got: the key `seed` for the second time; correct the line",
        ),
        ("", "the file must hold settings by name, got nothing; write {} for the ideal spec"),
        ("? [1]\n: 2", "must be YAML, got: found unhashable key"),
        ("- 1", "the file must hold settings by name, got list;"),
        ("tile: !!python/object:os.system {}", "must be YAML, got: could not determine a constructor"),
    ],
)
def test_a_bad_file_is_named(text, message, tmp_path):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(gx.SpecError) as caught:
        gx.load_spec(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_missing_or_unreadable_file(tmp_path):
    gx.save_spec(gx.CrossbarSpec(), tmp_path / "spec.yaml")
    with pytest.raises(gx.SpecError) as caught:
        gx.load_spec(tmp_path / "sepc.yaml")
    assert str(caught.value) == (
        f"load_spec: `{tmp_path / 'sepc.yaml'}` must be a file, got none; "
        f"did you mean `{tmp_path / 'spec.yaml'}`?"
    )
    with pytest.raises(gx.SpecError, match=r"must be a readable text file, got .*directory"):
        gx.load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(gx.SpecError, match="must be a readable text file, got 'utf-8'"):
        gx.load_spec(tmp_path / "latin.yaml")
    with pytest.raises(gx.SpecError, match=r"got none; check the path$"):
        gx.load_spec(tmp_path / "no" / "where.yaml")


@pytest.mark.parametrize("name", PRESETS)
def test_presets_round_trip(name, tmp_path):
    spec = preset(name)
    gx.save_spec(spec, tmp_path / "spec.yaml")
    assert gx.load_spec(tmp_path / "spec.yaml") == spec


def test_a_device_in_the_place_of_a_preset_is_told_apart():
    with pytest.raises(
        gx.SpecError, match=r"must be a preset, got 'ecram'; `gpuxbar devices ecram --out spec\.yaml` makes"
    ):
        preset("ecram")
    with pytest.raises(gx.SpecError, match="must be a preset, got 'txsin'; did you mean `txsim`"):
        preset("txsin")


def test_txsim_is_the_papers():
    spec = gx.presets.txsim()
    assert (spec.tile.rows, spec.tile.cols) == (64, 64)
    assert (1 / spec.device.g_max, 1 / spec.device.g_min) == pytest.approx((100e3, 1e6))
    assert spec.mapping.slices * spec.mapping.slice_bits == 32
    assert (spec.dac.stream_bits, spec.mapping.scheme) == (1, "differential")
    assert spec.adc.bits == 10
    assert gx.presets.txsim(tile=32).adc.bits == 9
    assert gx.presets.txsim_in_situ(nu=1.0).update == Agarwal(nu=1.0, gamma=0.05)
    with pytest.raises(gx.SpecError, match="`tile` must be 2 to 1024 lines, got 1"):
        gx.presets.txsim(tile=1)


@pytest.mark.parametrize(
    ("change", "most"),
    [
        ({"tile": {"rows": 256}}, "0.000512"),
        ({"tile": {"cols": 256}}, "0.000512"),
        ({"device": {"g_max": 2e-5}}, "0.000256"),
        ({"dac": {"v_read": 1.0}}, "0.00064"),
    ],
)
def test_ranges_that_held_all_currents_are_given_anew_where_these_grow(change, most):
    """As of a preset: currents would be cut off without a word."""
    txsim = gx.presets.txsim()
    text = rf"`adc\.i_max` must be given where currents grow, got 0.000205 A, .* 0.000128 A of before, but not {most} A"
    with pytest.raises(gx.SpecError, match=text):
        txsim.with_overrides(change)
    for adc in (
        {"i_max": 1e-3},
        {"i_max": txsim.adc.i_max},
        {"range": "worst_case", "i_max": None},
        {"bits": None},
    ):
        assert txsim.with_overrides({**change, "adc": adc}).adc.bits == adc.get("bits", 10)


def test_other_ranges_stay_as_they_are_where_currents_grow():
    """Those that cut currents off already, that still hold all, and of reads that convert nothing."""
    txsim = gx.presets.txsim()
    assert txsim.with_overrides({"tile": {"rows": 100, "cols": 32}}).adc == txsim.adc
    most = 128 * gx.CrossbarSpec().dac.v_read * gx.CrossbarSpec().device.g_max
    rounded = gx.CrossbarSpec(adc={"bits": 8, "range": "fixed", "i_max": most * (1 - 1e-7)})
    with pytest.raises(gx.SpecError, match=r"`adc\.i_max` must be given where currents grow"):
        rounded.with_overrides({"tile": {"rows": 256}})
    narrow = gx.CrossbarSpec(adc={"bits": 8, "range": "fixed", "i_max": 1e-5})
    assert narrow.with_overrides({"tile": {"rows": 256}}).adc == narrow.adc
    forward = txsim.with_overrides({"backward": {"mode": "ideal"}})
    assert forward.with_overrides({"tile": {"cols": 256}}).adc == txsim.adc
    apart = txsim.with_overrides({"backward": {"adc": txsim.adc.model_dump()}})
    with pytest.raises(gx.SpecError, match=r"`backward\.adc\.i_max` must be given where currents grow"):
        apart.with_overrides({"tile": {"cols": 256}})


def test_ranges_that_cut_currents_off_may_begin_to_convert():
    """Whether currents grow does not depend on what was converted before."""
    narrow = gx.CrossbarSpec(adc={"range": "fixed", "i_max": 1e-5}, backward={"mode": "ideal"})
    converting = narrow.with_overrides({"adc": {"bits": 6}})
    assert (converting.adc.bits, converting.adc.i_max) == (6, 1e-5)
    assert converting.with_overrides({"backward": {"mode": "analog"}}).backward_adc == converting.adc


def test_a_curve_that_all_converters_share_is_not_drawn():
    drawn = {key: gx.CrossbarSpec(adc={"bits": 8, key: 0.5}).draws for key in ("inl", "inl_std", "gain_std")}
    assert drawn == {"inl": False, "inl_std": True, "gain_std": True}


def test_conversions_of_txsim_are_exact():
    """The 8-bit inputs are all that is left: a layer reads as the product of its quantised inputs and weights."""
    spec = gx.presets.txsim(tile=7)
    layer = gx.nn.AnalogLinear(17, 5, bias=False, spec=spec)
    x = torch.randn(3, 17)
    lsb = x.abs().amax(1, keepdim=True) / 127
    expected = torch.round(x / lsb) * lsb @ layer.weight.T
    # 32-bit weights: float32 rounding is all that remains
    torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-5)


def test_transposed_reads_need_no_bits_where_nothing_is_converted_forwards():
    spec = gx.CrossbarSpec.model_validate(
        {"backward": {"dac": {"range": "tensor"}, "adc": {"per": "column"}}}
    )
    assert (spec.backward_dac.bits, spec.backward_adc.bits) == (None, None)


@pytest.mark.parametrize(
    ("settings", "leaves", "draws"),
    [
        ({}, None, False),
        ({"drift": {"nu": 0.1}}, "drift", False),
        ({"drift": {"nu_min": 0.1}}, "drift", False),
        ({"drift": {"flicker": 0.1}}, "drift", True),
        ({"drift": MEASURED}, None, False),
        ({"drift": MEASURED | {"shift": [[0, 1e-7]]}}, "drift", False),
        ({"drift": MEASURED | {"std": [[0, 1e-7]]}}, "drift", True),
        ({"programming": {"write_noise": [0, 1e-7]}}, "writes", True),
    ],
)
def test_what_leaves_levels_and_what_is_random_is_known(settings, leaves, draws):
    spec = gx.CrossbarSpec.model_validate({"device": {"levels": 4}} | settings)
    assert (spec.off_levels is None) if leaves is None else (leaves in spec.off_levels)
    assert spec.draws == draws


def test_isaac_is_the_papers():
    spec = gx.presets.isaac()
    assert (spec.tile.rows, spec.tile.cols, spec.adc.bits) == (128, 128, 8)
    assert (spec.mapping.slices, spec.mapping.slice_bits, spec.dac.stream_bits) == (8, 2, 1)


def test_an_unknown_preset_is_answered_with_the_nearest():
    with pytest.raises(gx.SpecError, match="got 'txsimm'; did you mean `txsim`"):
        preset("txsimm")
