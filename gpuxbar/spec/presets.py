"""Specs of published systems, and a mild one to start from.

Each says which values its source gives and which are chosen here. Change one with
`spec.with_overrides({"adc": {"bits": 6}})`.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any

from gpuxbar.spec.ageing import MOST_SHARES
from gpuxbar.spec.devices import DEVICES
from gpuxbar.spec.errors import SpecError, nearest
from gpuxbar.spec.model import CrossbarSpec

__all__ = ["PRESETS", "demo", "isaac", "pcm", "preset", "reram", "txsim", "txsim_in_situ"]


def demo() -> CrossbarSpec:
    """8-bit converters and read noise of about one ADC step, on 128 x 128 tiles of subtracted pairs.

    In situ the devices follow Agarwal's law with a non-linearity of 0.1, write noise of 2 % (see there) and of 10 % of
    each change. Chosen to be mild: a small network trains on it to within a percent of the ideal one.
    """
    return CrossbarSpec.model_validate(
        {
            "mapping": {"scheme": "subtracted"},
            "dac": {"bits": 8},
            "adc": {"bits": 8, "percentile": 100},
            "read_noise": {"sigma": 2e-8},
            "update": {"law": "agarwal", "nu": 0.1, "gamma": 0.02, "cycle": 0.1},
        }
    )


def txsim(tile: int = 64) -> CrossbarSpec:
    """The read path of TxSim: bit-sliced weights, bit-streamed inputs, a conversion for every tile and slice.

    From the paper: square tiles, 64 x 64 unless swept; Ag/Si ReRAM from 100 kOhm to 1 MOhm (1 to 10 uS);
    positive and negative weights on arrays of their own; 2-bit devices; 1-bit DACs; 32-bit weights, so 16 slices.
    Chosen here: 8-bit inputs, scaled by each sample (the paper keeps 32 digital bits; this library's DACs take up
    to 8), driven as a positive and a negative phase; ADCs with a step of one `g_min`, of which every current is a
    multiple, so that conversions are exact until noise, spread, wires or fewer bits are asked for. While they are, a read
    is one product; then it is 448 conversions for every tile and output, unless `adc={"bits": None}` leaves them out.
    Bits and range of the ADCs are those of `tile`: overrides with larger tiles, windows or voltages give `adc.i_max` too.
    Not in it: the paper's wire, source and sink resistances and its process variation, whose values it does not give;
    set them with `parasitics` and `programming`.

    Args:
        tile: Wordlines and bitlines of a tile, 2 to 1024.

    Source: Roy et al., "TxSim: Modeling Training of Deep Neural Networks on Resistive Crossbar Systems",
    IEEE TVLSI 2021.
    """
    array = _txsim_array(tile)
    v_read, steps = 0.2, round(array["device"]["g_max"] / array["device"]["g_min"])
    bits = (tile * steps).bit_length()
    return CrossbarSpec.model_validate(
        {
            **array,
            "mapping": {"scheme": "differential", "slices": 16, "slice_bits": 2},
            "dac": {
                "bits": 8,
                "stream_bits": 1,
                "polarity": "two_phase",
                "range": "sample",
                "v_read": v_read,
            },
            "adc": {
                "bits": bits,
                "range": "fixed",
                "i_max": (2**bits - 1) * v_read * array["device"]["g_min"],
            },
        }
    )


def txsim_in_situ(tile: int = 64, nu: float = 0.1, gamma: float = 0.05) -> CrossbarSpec:
    """The weight update of TxSim, asymmetric and noisy, on the devices and tiles of `txsim`.

    From the paper: devices, tiles and the law with its factors `nu` and `gamma`; training bears nu up to 0.1
    and gamma up to 5.
    Chosen here: gamma read in percent (5 is 0.05), since the unit is not certain; one continuous pair of
    devices a weight; exact converters. The sliced weights of PANTHER, on which the paper builds, are
    `with_overrides({"mapping": {"slices": 16, "slice_bits": 2}, "carry": {"scheme": "streamed"}})`, or with the scheme
    "accumulate", which cuts the digits of a change that is formed before: see `Carry`.
    Whether nu = 1 fails, as the paper has it, depends on what a write adds up: such a pair decays with every write,
    by nu / 2 of |dw| w / w_max, so it fails when every few samples are written, and learns when minibatches and
    momentum cancel opposite changes before.

    Args:
        tile: Wordlines and bitlines of a tile.
        nu: Non-linearity of the update, 0 (linear) to 20.
        gamma: Write noise as a plain multiplier, at least 0.

    Source: Roy et al., IEEE TVLSI 2021; Agarwal et al., IJCNN 2016.
    """
    return CrossbarSpec.model_validate(
        {**_txsim_array(tile), "update": {"law": "agarwal", "nu": nu, "gamma": gamma}}
    )


def isaac() -> CrossbarSpec:
    """The tiles of ISAAC, for networks that will run on such an inference accelerator.

    From the paper: 128 x 128 tiles, 2-bit devices, 8 of them a 16-bit weight, 1-bit DACs, 8-bit ADCs.
    Chosen here: 8-bit inputs (the paper's have 16), driven as a positive and a negative phase; signed
    weights on pairs of devices, where the paper adds a bias to the weights and halves the range of a column by
    storing some inverted; the conductance window; an exact gradient, since the chip does not train.

    Source: Shafiee et al., "ISAAC: A Convolutional Neural Network Accelerator with In-Situ Analog Arithmetic in
    Crossbars", ISCA 2016.
    """
    return CrossbarSpec.model_validate(
        {
            "tile": {"rows": 128, "cols": 128},
            "mapping": {"scheme": "differential", "slices": 8, "slice_bits": 2},
            "dac": {"bits": 8, "stream_bits": 1, "polarity": "two_phase"},
            "adc": {"bits": 8, "range": "worst_case"},
            "backward": {"mode": "ideal"},
        }
    )


def pcm() -> CrossbarSpec:
    """Inference on phase-change memory over time: noisy programming, drift, and 1/f noise, on exact converters.

    From the fit: all of `programming` and `drift`, and 25 uS. Chosen here: pairs from 0 to 25 uS, converters left out; give
    them with `with_overrides`. See `gpuxbar.program` and `gpuxbar.age`.

    Source: Joshi et al., "Accurate deep neural network inference using computational phase-change memory", Nature
    Communications 2020, with the coefficients of aihwkit's PCM model (Rasch et al., AICAS 2021).
    """
    return CrossbarSpec.model_validate(
        {
            "device": {"g_min": 0.0, "g_max": 25e-6},
            "programming": {"write_noise": (0.26348e-6, 1.9650e-6, -1.1731e-6)},
            "drift": {
                "nu": 0.0244,
                "nu_slope": 0.0155,
                "nu_min": 0.049,
                "nu_max": 0.1,
                "nu_std": -0.0059,
                "nu_std_slope": 0.0125,
                "nu_std_min": 0.008,
                "nu_std_max": 0.045,
                "t_0": 20.0,
                "flicker": 0.0088,
                "flicker_exponent": 0.65,
                "flicker_max": 0.2,
                "t_read": 250e-9,
            },
        }
    )


def reram() -> CrossbarSpec:
    """Inference on the ReRAM of the NeuRRAM chip within two days of programming, on exact converters.

    From the fit: standard deviations around the conductance aimed at, after 1 s (`programming`), 1 day and 2 days (`drift`), of
    conductances up to 40 uS. Chosen here: pairs from 1 to 40 uS; no shift of the mean; converters left out; give them with
    `with_overrides`. Noise of reads is not in the fit: about a percent, `read_noise={"sigma_g": 4e-7, "exponent": 1}`. See
    `gpuxbar.program` and `gpuxbar.age`.

    Source: Wan et al., "A compute-in-memory chip based on resistive random-access memory", Nature 2022 (Extended Data Fig. 3), with
    the coefficients of aihwkit's fit (`ReRamWan2022NoiseModel`).
    """
    shares = [i / (MOST_SHARES - 1) for i in range(MOST_SHARES)]

    def deviation(terms: tuple[float, ...], r: float) -> float:
        return sum(1e-6 * term * r**power for power, term in enumerate(terms))

    def gained(terms: tuple[float, ...]) -> list[float]:
        """Standard deviation of the change since the write, S: variances add."""
        return [sqrt(deviation(terms, r) ** 2 - deviation(written, r) ** 2) for r in shares]

    written = 0.348, 16.030, -43.853, 45.393, -16.815
    days = (0.701, 22.086, -50.773, 47.095, -16.458), (0.782, 20.274, -43.507, 37.062, -11.934)
    return CrossbarSpec.model_validate(
        {
            "device": {"g_min": 1e-6, "g_max": 40e-6},
            "programming": {"write_noise": [1e-6 * term for term in written]},
            "drift": {
                "law": "measured",
                "ages": [86400.0, 172800.0],
                "shares": shares,
                "shift": [[0.0] * MOST_SHARES] * 2,
                "std": [gained(terms) for terms in days],
            },
        }
    )


PRESETS: dict[str, Callable[[], CrossbarSpec]] = {
    "demo": demo,
    "isaac": isaac,
    "pcm": pcm,
    "reram": reram,
    "txsim": txsim,
    "txsim-in-situ": txsim_in_situ,
}


def preset(name: str) -> CrossbarSpec:
    """A preset by name, as the command line gives it."""
    if name not in PRESETS:
        a_device = f"`gpuxbar devices {name} --out spec.yaml` makes a spec of this device, for --spec"
        way_out = a_device if name in DEVICES else nearest(name, PRESETS)
        raise SpecError(f"preset: `name` must be a preset, got {name!r}; {way_out}")
    return PRESETS[name]()


def _txsim_array(tile: int) -> dict[str, Any]:
    if not 2 <= tile <= 1024:
        raise SpecError(f"txsim: `tile` must be 2 to 1024 lines, got {tile}; the paper's default is 64")
    return {"tile": {"rows": tile, "cols": tile}, "device": {"g_min": 1e-6, "g_max": 1e-5}}
