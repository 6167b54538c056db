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


def windowed_mixer(q, k, v, taps, gates, kept, window, kept_window, shared, features=None):
    """Each head of q by itself: a kept one attends to its window; any other to `window` tokens, and its filters follow.

    q, k and v are (batch, head, length, channel); taps is (filter, length), gates (batch, 2 · head, length, 1).
    `shared`: whether the heads of q that share a head of k and v share its filters too.
    """
    queries = q.shape[1] // k.shape[1]
    rest = [head for head in range(q.shape[1]) if head // queries not in kept]
    states = len(rest) // queries if shared else len(rest)  # heads that have filters of their own
    outputs = []
    for head in range(q.shape[1]):
        own = head // queries
        if own in kept:
            outputs.append(attention(q[:, head], k[:, own], v[:, own], kept_window or q.shape[2]))
            continue
        place = rest.index(head)
        near = attention(q[:, head], k[:, own], v[:, own], window)
        if not len(taps):
            outputs.append(near)
            continue
        state = place * states // len(rest)
        if features is None:
            per_state = len(taps) // states
            filters = taps[state * per_state : (state + 1) * per_state]
            width = q.shape[3] // per_state
            parts = [
                far_sums(a * width**-0.5, b, c, h, window)
                for a, b, c, h in zip(
                    *(x.split(width, -1) for x in (q[:, head], k[:, own], v[:, own])), filters, strict=True
                )
            ]
            far = torch.cat(parts, -1)
        else:
            a, b = two_softmaxes(q[:, head] @ features.q[place]), two_softmaxes(k[:, own] @ features.k[state])
            far = far_sums(a, b, v[:, own], taps[state], window)
            weight = far_sums(a, b, torch.ones_like(v[:, own, :, :1]), taps[state], window)
            far = far / torch.where(weight == 0, 1, weight)
        if gates is not None:
            near_gate, far_gate = gates.chunk(2, dim=1)
            far = near_gate[:, place] * near + far_gate[:, place] * far
        outputs.append(far)
    return torch.stack(outputs, dim=1)


def attention(q, k, v, window):
    """softmax over the last `window` tokens, of (batch, length, channel); zero for a window of 0."""
    rows = []
    for t in range(q.shape[1]):
        seen = slice(max(0, t + 1 - window), t + 1)
        scores = (k[:, seen] @ q[:, t, :, None])[..., 0] * q.shape[-1] ** -0.5
        rows.append((scores.softmax(-1)[..., None] * v[:, seen]).sum(1) if window else torch.zeros_like(v[:, 0]))
    return torch.stack(rows, dim=1)


def far_sums(q, k, v, taps, window):
    """Σ_{s≤t-W} h_{t-W-s} (q_t · k_s) v_s of one head, (batch, length, channel)."""
    rows = []
    for t in range(q.shape[1]):
        total = torch.zeros_like(v[:, 0])
        for s in range(t + 1 - window):
            total = total + taps[t - window - s] * (q[:, t] * k[:, s]).sum(-1, keepdim=True) * v[:, s]
        rows.append(total)
    return torch.stack(rows, dim=1)


def two_softmaxes(x):
    return torch.cat([x.softmax(-1), (-x).softmax(-1)], -1)
