"""What an LSTM makes of the products at its gates, and the gradient, in NumPy float64: oracles of `ops.lstm_gates`."""

from __future__ import annotations

import numpy as np

__all__ = ["lstm_gates", "lstm_gates_gradient"]


def lstm_gates(x: np.ndarray, y: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(o tanh(c'), c' = f c + i g, [i, f, g, o, tanh(c')]) of samples' products [B, 4 H] and cells [B, H]"""
    z = (x.astype(np.float64) + y).reshape(len(c), 4, c.shape[1])
    i, f, o = (np.exp(-np.logaddexp(0, -z[:, k])) for k in (0, 1, 3))
    g = np.tanh(z[:, 2])
    c = f * c + i * g
    gates = np.concatenate([i, f, g, o, np.tanh(c)], axis=1)
    return o * np.tanh(c), c, gates


def lstm_gates_gradient(
    grad_h: np.ndarray, grad_c: np.ndarray, gates: np.ndarray, c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of the products, [B, 4 H], and of the cells before, [B, H], from those of the state (h, c') after."""
    i, f, g, o, t = (gates.astype(np.float64).reshape(len(c), 5, c.shape[1])[:, k] for k in range(5))
    d = grad_c + grad_h * o * (1 - t**2)
    of_products = d * g * i * (1 - i), d * c * f * (1 - f), d * i * (1 - g**2), grad_h * t * o * (1 - o)
    return np.concatenate(of_products, axis=1), d * f
