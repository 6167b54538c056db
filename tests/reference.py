"""Slow and obviously right."""

import torch


def relative_error(reference, x):
    """RMS(reference - x) / RMS(reference)."""
    return ((reference - x).abs().square().mean() / reference.abs().square().mean()).sqrt().item()


def assert_close(reference, x, tolerance):
    assert reference.shape == x.shape
    found = relative_error(reference, x)
    assert found <= tolerance, f"relative error {found:.2e}, tolerance {tolerance:.0e}"


def convolution(u, taps):
    """y_t = Σ_{s≤t} h_{t-s} u_s; u is (batch, channel, length)."""
    y = torch.zeros_like(u)
    for t in range(u.shape[-1]):
        for s in range(t + 1):
            y[..., t] = y[..., t] + taps[:, t - s] * u[..., s]
    return y


def mixer(q, k, v, taps):
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s; q, k, v are (batch, filter, length, width)."""
    y = torch.zeros_like(v)
    for t in range(v.shape[2]):
        for s in range(t + 1):
            weight = taps[:, t - s, None] * (q[:, :, t] * k[:, :, s]).sum(-1, keepdim=True)
            y[:, :, t] = y[:, :, t] + weight * v[:, :, s]
    return y


def for_each_query(form, q, *others):
    """A form that knows one query, for each query of q (batch, filter, query, …), which is its first argument."""
    return torch.stack([form(query, *others) for query in q.unbind(2)], dim=2)


def full_recurrence(gates, v, taps):
    """z^1 = v, z^{n+1}_t = x^n_t (h^n * z^n)_t; gates and v are (batch, channel, length), taps a set for each gate."""
    for gate, h in zip(gates, taps, strict=True):
        v = gate * convolution(v, h)
    return v


def recurrence(q, k, v, poles, residues, mode_filter, direct, state):
    """Token by token: x ← λ x + k vᵀ, y = Re Σ_m R_m qᵀ x_m + D (q · k) v."""
    outputs = []
    for t in range(q.shape[2]):
        outer = k[:, :, t, :, None] * v[:, :, t, None, :]
        state = poles[:, None, None] * state + outer[:, mode_filter]
        y = direct[:, None] * (q[:, :, t] * k[:, :, t]).sum(-1, keepdim=True) * v[:, :, t]
        for m, f in enumerate(mode_filter.tolist()):
            read = torch.einsum("bi,bij->bj", q[:, f, t].to(state.dtype), state[:, m])
            y[:, f] = y[:, f] + (residues[m] * read).real
        outputs.append(y)
    return torch.stack(outputs, dim=2), state
