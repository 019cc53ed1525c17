"""What resistive wires leave of a tile's conductances, exactly and approximately, in NumPy float64.

A tile of linear devices and wires is a linear network, so its output currents are i = v @ G_eff. Circuit and names:
`reference/nodal.py`. `exact` merges blocks of cells; the other methods take O(R C).

**Block merge.** A block of p x q cells is a network of four sides: the wordlines at its left (L) and right (R), the
bitlines at its top (T) and bottom (B). With hybrid ports x = (u_L, c_R, c_T, w_B), voltages at L and B and injected
currents at R and T, the answers y = (i_L, -u_R, -w_T, i_B) are y = Q x with Q symmetric, whatever is 0. Two blocks
are joined at a side, current port k1 of block 1 against voltage port k2 of block 2:

    Z = -Q1[k1, k1], A = Q2[k2, k2], F = (1 + Z A)^-1
    Q11 = Q1 + B1 A F B1',  Q22 = Q2 - B2 F Z B2',  Q12 = -B1 F' B2'       B1 = Q1[rest, k1], B2 = Q2[rest, k2]

Z and A are positive semidefinite, so 1 + Z A is never singular. Cells become blocks of 2, 4, ... and the tile;
G_eff = -Q[L, B]. Padding with open cells at the open ends, right and top, changes nothing.

Source: Redheffer, J. Math. Phys. 41 (1962) (star product of scattering networks).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from gpuxbar.reference.nodal import Wires

__all__ = ["METHODS", "close", "effective_conductance", "ladder_factors", "mean_field", "ports"]

METHODS = ("none", "first_order", "ladder", "mean_field", "exact")


def effective_conductance(
    g: np.ndarray,
    *,
    r_wordline: Any,
    r_bitline: Any,
    r_source: Any = 0.0,
    r_sink: Any = 0.0,
    method: str = "exact",
    shared_drivers: bool = False,
) -> np.ndarray:
    """Effective conductances [..., R, C], S, of tiles [..., R, C]; arguments as in `ops.effective_conductance`."""
    g = np.asarray(g, np.float64)
    wires = Wires.of(g.shape[-2], g.shape[-1], r_wordline, r_bitline, r_source, r_sink)
    if method == "none" or not g.size:
        return g.copy()
    if method == "exact":
        return _shared(g, wires) if shared_drivers else -ports(g, wires)["LB"]
    if method == "first_order":
        return g * (1 - _first_order_drops(g, wires))
    if method == "ladder":
        along, down = ladder_factors(g, wires)
        return g * along * down
    return mean_field(g, wires)


def ports(g: np.ndarray, wires: Wires) -> dict[str, np.ndarray]:
    """The tile as a network of its two outer sides: Q["LL"] [R, R], Q["LB"] [R, C] and Q["BB"] [C, C]."""
    rows, cols = g.shape[-2:]
    high, wide = (1 << (n - 1).bit_length() for n in (rows, cols))
    top = high - rows
    left, below = (np.zeros((high, wide)) for _ in range(2))
    left[top:, :cols], below[top:, :cols] = wires.segments()
    padded = np.zeros((*g.shape[:-2], high, wide))
    padded[..., top:, :cols] = g
    q, p_rows, p_cols = _cells(padded, left, below), 1, 1
    while q.shape[-4] > 1 or q.shape[-3] > 1:
        if q.shape[-3] > 1:
            q = _join(q[..., 0::2, :, :], q[..., 1::2, :, :], p_rows, p_cols, along_rows=True)
            p_cols *= 2
        if q.shape[-4] > 1:
            q = _join(q[..., 1::2, :, :, :], q[..., 0::2, :, :, :], p_rows, p_cols, along_rows=False)
            p_rows *= 2
    q = q[..., 0, 0, :, :]
    start, end = slice(top, high), slice(2 * high + wide, 2 * high + wide + cols)
    return {"LL": q[..., start, start], "LB": q[..., start, end], "BB": q[..., end, end]}


def _cells(g: np.ndarray, left: np.ndarray, below: np.ndarray) -> np.ndarray:
    """Q [..., R, C, 4, 4] of single cells with their left and lower wire segments; ports in the order L, R, T, B."""
    drop = 1 + g * (left + below)
    w = np.stack(np.broadcast_arrays(1.0, left, -below, -1.0), -1)  # the device's voltage from the ports
    q = (g / drop)[..., None, None] * w[..., :, None] * w[..., None, :]
    q[..., 0, 1] = q[..., 1, 0] = -(1 + g * below) / drop
    q[..., 1, 1] = -left * (1 + g * below) / drop
    q[..., 2, 3] = q[..., 3, 2] = -(1 + g * left) / drop
    q[..., 2, 2] = -below * (1 + g * left) / drop
    return q


def _join(q1: np.ndarray, q2: np.ndarray, rows: int, cols: int, along_rows: bool) -> np.ndarray:
    """Blocks of rows x cols joined: block 1 left of block 2, or block 1 below block 2."""
    left, top = np.arange(rows), 2 * rows + np.arange(cols)
    r, t, b = left + rows, top, top + cols
    if along_rows:
        k1, k2, rest1, rest2 = r, left, np.r_[left, t, b], np.r_[r, t, b]
        # places in (L, R, T1, T2, B1, B2)
        to1 = np.r_[left, t, b + cols]
        to2 = np.r_[r, t + cols, b + 2 * cols]
    else:
        k1, k2, rest1, rest2 = t, b, np.r_[left, r, b], np.r_[left, r, t]
        # places in (L2, L1, R2, R1, T2, B1)
        to1 = np.r_[left + rows, r + 2 * rows, b + 2 * rows]
        to2 = np.r_[left, r + rows, t + 2 * rows]
    z, a = -_part(q1, k1, k1), _part(q2, k2, k2)
    b1, b2 = _part(q1, rest1, k1), _part(q2, rest2, k2)
    f = np.linalg.inv(np.eye(len(k1)) + z @ a)
    q = np.empty((*q1.shape[:-2], len(to1) + len(to2), len(to1) + len(to2)))
    q[..., to1[:, None], to1] = _part(q1, rest1, rest1) + b1 @ (a @ f) @ _turned(b1)
    q[..., to2[:, None], to2] = _part(q2, rest2, rest2) - b2 @ (f @ z) @ _turned(b2)
    cross = -b1 @ _turned(f) @ _turned(b2)
    q[..., to1[:, None], to2] = cross
    q[..., to2[:, None], to1] = _turned(cross)
    return q


def _part(q: np.ndarray, rows: np.ndarray, cols: np.ndarray) -> np.ndarray:
    return q[..., rows[:, None], cols]


def _turned(a: np.ndarray) -> np.ndarray:
    return np.swapaxes(a, -1, -2)


def close(admittance: np.ndarray, resistance: np.ndarray, transfer: np.ndarray) -> np.ndarray:
    """(1 + Y r)^-1 G: the transfer of a network once resistances r [n] stand before its n ports of admittance Y.

    The ports get u = v - r Y u, so the currents u @ G are v @ (1 + r Y)^-T G, and Y is symmetric.
    """
    return np.linalg.solve(np.eye(len(resistance)) + admittance * resistance, transfer)


def _shared(g: np.ndarray, wires: Wires) -> np.ndarray:
    """Tiles [..., U, R, C] side by side on the same drivers: the source resistance carries the current of all."""
    bare = ports(g, Wires(wires.wordline, wires.bitline, np.zeros_like(wires.source), wires.sink))
    together = bare["LL"].sum(-3, keepdims=True)
    return close(np.broadcast_to(together, bare["LL"].shape), wires.source, -bare["LB"])


def ladder_factors(g: np.ndarray, wires: Wires) -> tuple[np.ndarray, np.ndarray]:
    """Share of the drive that reaches each cell on bitlines held at 0, and of a cell's current that reaches the sink.

    A wordline alone is a ladder: y_c = g_c + a_{c+1} y_{c+1} is the admittance from cell c on, a_c = 1 / (1 + r_c y_c)
    what its left segment leaves; the voltage is the product of a along the line. Bitlines alike, from the lower end.
    Only positive numbers are added, so that float32 keeps its digits.
    """
    left, below = wires.segments()
    return _attenuation(g, left, -1), _attenuation(g[..., ::-1, :], below[::-1], -2)[..., ::-1, :]


def _attenuation(g: np.ndarray, resistance: np.ndarray, axis: int) -> np.ndarray:
    g = np.moveaxis(g, axis, -1)
    resistance = np.moveaxis(np.broadcast_to(resistance, resistance.shape), axis, -1)
    factor = np.empty_like(g)
    beyond = np.zeros(g.shape[:-1])
    for at in reversed(range(g.shape[-1])):
        beyond = beyond + g[..., at]
        factor[..., at] = 1 / (1 + resistance[..., at] * beyond)
        beyond = beyond * factor[..., at]
    return np.moveaxis(np.cumprod(factor, -1), -1, axis)


def _first_order_drops(g: np.ndarray, wires: Wires) -> np.ndarray:
    """Relative drop of a cell's voltage by the currents along its lines at full drive: the first term in r."""
    left, below = wires.segments()
    along = np.cumsum(left * np.cumsum(g[..., ::-1], -1)[..., ::-1], -1)
    down = np.cumsum((below * np.cumsum(g, -2))[..., ::-1, :], -2)[..., ::-1, :]
    return along + down


def mean_field(g: np.ndarray, wires: Wires) -> np.ndarray:
    """The ladder, plus the coupling between lines read off a coarsened tile of at most 16 x 16 cells.

    k x k cells become one: their conductances in parallel, wires of k lines in parallel and k segments in series.
    What the coarse tile's exact G_eff has beyond its ladder, divided by the strengths P_I Q_L of its lines (sums of
    the ladder over their cells), is smooth; it is interpolated bilinearly and multiplied by the strengths p_i q_l.
    """
    along, down = ladder_factors(g, wires)
    base = g * along * down
    k = -(-max(g.shape[-2:]) // 16)
    if k == 1:
        return -ports(g, wires)["LB"]
    coarse, coarse_wires = coarsen(g, wires, k)
    coarse_along, coarse_down = ladder_factors(coarse, coarse_wires)
    coupling = -ports(coarse, coarse_wires)["LB"] - coarse * coarse_along * coarse_down
    p, q = base.sum(-1), base.sum(-2)
    p_coarse, q_coarse = _sums(p, k, pad_front=True), _sums(q, k, pad_front=False)
    scale = p_coarse[..., :, None] * q_coarse[..., None, :]
    smooth = np.divide(coupling, scale, out=np.zeros_like(coupling), where=scale > 0)
    rows, cols = g.shape[-2:]
    up = interpolation(rows, k, pad_front=True) @ smooth @ interpolation(cols, k, pad_front=False).T
    return base + up * p[..., :, None] * q[..., None, :]


def coarsen(g: np.ndarray, wires: Wires, k: int) -> tuple[np.ndarray, Wires]:
    """The tile with k x k cells merged into one; padded with open cells at the open ends, right and top."""
    coarse = _sums(_turned(_sums(g, k, pad_front=False)), k, pad_front=True)

    def mean(r: np.ndarray, pad_front: bool) -> np.ndarray:
        counts = _sums(np.ones(len(r)), k, pad_front)
        return _sums(r, k, pad_front) / counts

    # a block's cells hang on average (k - 1) / 2 segments behind the end of its lines
    wordline, bitline = mean(wires.wordline, True), mean(wires.bitline, False)
    source = (mean(wires.source, True) + wordline * (k - 1) / 2) / k
    sink = (mean(wires.sink, False) + bitline * (k - 1) / 2) / k
    return _turned(coarse), Wires(wordline, bitline, source, sink)


def _sums(x: np.ndarray, k: int, pad_front: bool) -> np.ndarray:
    """Sums of k neighbours along the last axis, padded with zeros to whole blocks."""
    count = x.shape[-1]
    pad = -count % k
    widths = [(0, 0)] * (x.ndim - 1) + [(pad, 0) if pad_front else (0, pad)]
    return np.pad(x, widths).reshape(*x.shape[:-1], -1, k).sum(-1)


def interpolation(count: int, k: int, pad_front: bool) -> np.ndarray:
    """Weights [count, blocks] of linear interpolation between the centres of blocks of k; constant beyond them."""
    blocks = -(-count // k)
    at = (np.arange(count) + (-count % k if pad_front else 0) + 0.5) / k - 0.5
    low = np.clip(np.floor(at).astype(int), 0, max(blocks - 2, 0))
    share = np.clip(at - low, 0, 1)
    weights = np.zeros((count, blocks))
    weights[np.arange(count), low] = 1 - share
    weights[np.arange(count), np.minimum(low + 1, blocks - 1)] += share
    return weights
