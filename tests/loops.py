"""Every cell and option as a loop in PyTorch: whole batches and matrix products, PyTorch's own functions and gradients,
masks from a NumPy formulation of the random bits, packed sequences unpacked by PyTorch. It knows nothing of how
gatewise computes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

import gatewise as gw


def numpy_bits(seed: int, T: int, N: int, J: int) -> np.ndarray:
    """[T, N, J] the random bits, from their definition, in arrays."""
    u = np.uint64

    def mix64(z: np.ndarray) -> np.ndarray:
        z = (z ^ (z >> u(30))) * u(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u(27))) * u(0x94D049BB133111EB)
        return z ^ (z >> u(31))

    t, n, j = np.arange(T, dtype=u)[:, None, None], np.arange(N, dtype=u)[:, None], np.arange(J, dtype=np.uint32)
    of_step = mix64(np.full((1, 1, 1), seed, u) + u(0x9E3779B97F4A7C15) * (t + u(1)))
    key = mix64(of_step + u(0xD1B54A32D192ED03) * (n + u(1)))
    low, high = key.astype(np.uint32), (key >> u(32)).astype(np.uint32)
    return numpy_mix32(numpy_mix32(low + np.uint32(0x9E3779B9) * j) ^ high)


def numpy_mix32(x: np.ndarray) -> np.ndarray:
    u = np.uint32
    x = (x ^ (x >> u(16))) * u(0x7FEB352D)
    x = (x ^ (x >> u(15))) * u(0x846CA68B)
    return x ^ (x >> u(16))


def numpy_kept(seed: int, shape: tuple[int, int, int], p: float, of_c: bool = False) -> np.ndarray:
    """[T, N, J] what zoneout of h (or of c) keeps."""
    bits = numpy_bits(seed, *shape)
    bits = numpy_mix32(bits + np.uint32(0x85EBCA6B)) if of_c else bits
    return (bits >> np.uint32(1)) < np.floor(p * 2.0**31)


def torch_step(
    cell: str,
    p: dict[str, torch.Tensor],
    x: torch.Tensor,
    h: torch.Tensor,
    c: torch.Tensor,
    m: torch.Tensor,
    clip: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One step of a batch: h [N, R] and c [N, H] after it; m masks h before w_hh."""
    linear, norm, sigmoid, tanh = F.linear, F.layer_norm, torch.sigmoid, torch.tanh
    ax = linear(x, p["w_ih"], p.get("b_ih"))
    ah = linear(m * h, p["w_hh"], p.get("b_hh")) if "w_hh" in p else p.get("b_hh", 0)
    u = p["w_unit"].view(-1, c.shape[1]) if "w_unit" in p else None
    act = torch.relu if cell.endswith("relu") else tanh
    if cell.startswith("rnn"):
        return act(ax + ah), c
    if cell.startswith("indrnn"):
        return act(ax + ah + u[0] * h), c
    if cell == "gru_reset_before":
        r, z, n = ax.chunk(3, 1)
        hr, hz, _ = ah.chunk(3, 1)
        r, z = sigmoid(r + hr), sigmoid(z + hz)
        n = tanh(n + linear(r * (m * h), p["w_hh"].chunk(3)[2], p["b_hh"].chunk(3)[2] if "b_hh" in p else None))
        return (1 - z) * n + z * h, c
    if cell.startswith("gru"):
        if cell == "gru_norm":
            ax = norm(ax, ax.shape[1:]) * u[:3].flatten() + u[6:9].flatten()
            ah = norm(ah, ah.shape[1:]) * u[3:6].flatten() + F.pad(u[9], (2 * c.shape[1], 0))
        (r, z, n), (hr, hz, hn) = ax.chunk(3, 1), ah.chunk(3, 1)
        r, z = sigmoid(r + hr), sigmoid(z + hz)
        return (1 - z) * tanh(n + r * hn) + z * h, c
    if cell == "lstm_norm":
        ax, ah = norm(ax, ax.shape[1:]) * u[:4].flatten(), norm(ah, ah.shape[1:]) * u[4:8].flatten()
        i, f, g, o = (ax + ah + u[8:12].flatten()).chunk(4, 1)
    elif cell == "lstm_coupled":
        i, g, o = (ax + ah).chunk(3, 1)
        f = -i  # sigmoid(-a) = 1 - sigmoid(a)
    else:
        i, f, g, o = (ax + ah).chunk(4, 1)
    if cell == "lstm_peephole":
        i, f = i + u[0] * c, f + u[1] * c
    c = (sigmoid(f) * c + sigmoid(i) * tanh(g)).clamp(-clip, clip)
    if cell == "lstm_peephole":
        o = o + u[2] * c
    h = sigmoid(o) * tanh(norm(c, c.shape[1:]) * u[12] + u[13] if cell == "lstm_norm" else c)
    return linear(h, p["w_hr"]) if "w_hr" in p else h, c


def torch_loop(cell: str, options: dict[str, Any], p: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """y, hn and cn of functional.forward(cell, ..., **options), its arrays being `p`."""
    x, h0, reset = p["x"], p["h0"], torch.tensor(options.get("reset", False))
    batch_first, sizes = options.get("batch_first", False), options.get("batch_sizes")
    if sizes is not None:
        x, lengths = unpack(x, sizes)
        reset, _ = unpack(reset, sizes)
    elif batch_first:
        x, reset = x.transpose(0, 1), reset.T
    (T, N), R, H = x.shape[:2], h0.shape[1], p["w_ih"].shape[0] // gw.cells()[cell]["G"]
    if sizes is None:
        lengths = torch.tensor(options.get("lengths", np.full(N, T)))
    reset = reset.expand(T, N)
    c0 = p.get("c0", torch.zeros(N, H, dtype=x.dtype))
    start = (h0, c0) if options.get("reset_to") != "zero" else (0 * h0, 0 * c0)
    seed, rows = options.get("seed"), torch.arange(N)
    k = {}
    for name, width in (("h", R), ("c", H)):
        share = options.get(f"zoneout_{name}", 0.0)
        kept = np.full((T, N, width), share) if seed is None else numpy_kept(seed, (T, N, width), share, name == "c")
        k[name] = torch.tensor(kept, dtype=x.dtype)
    mask = torch.tensor(options.get("h_mask", np.ones((N, R))), dtype=x.dtype)
    h, c, y = h0, c0, torch.zeros(T, N, R, dtype=x.dtype)
    for step in range(T):
        on = step < lengths
        t = (lengths - 1 - step).clamp(0) if options.get("reverse") else torch.full((N,), step)
        fresh = reset[(t + 1).clamp(max=T - 1), rows] & (step > 0) if options.get("reverse") else reset[t, rows]
        old = [torch.where(fresh[:, None], a, b) for a, b in zip(start, (h, c))]
        new = torch_step(cell, p, x[t, rows], *old, mask, options.get("cell_clip") or np.inf)
        h, c = (
            torch.where(on[:, None], k[name][t, rows] * a + (1 - k[name][t, rows]) * b, state)
            for name, a, b, state in zip("hc", old, new, (h, c))
        )
        y = y.index_put((t[on], rows[on]), h[on])
    if sizes is not None:
        y = pack_padded_sequence(y, lengths).data
    elif batch_first:
        y = y.transpose(0, 1)
    return {"y": y, "hn": h, **({"cn": c} if "c0" in p else {})}


def unpack(data: torch.Tensor, batch_sizes: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return pad_packed_sequence(PackedSequence(data, torch.tensor(batch_sizes)))
