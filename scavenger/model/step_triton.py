"""One token through a mixer as one Triton kernel, on a GPU: the state is read and written once, nothing else twice.

One program takes one row and one head of k and v, with its heads of q. It computes q, k and v at any channels from the
projections, so that it can go through the rows of a state in tiles; what it writes of q, k and v it writes at its end.
Arithmetic is in float32, in float64 where the projections are; states have any type of float.
"""

import functools

import torch


try:
    import triton
    from triton import language as tl
except ImportError:  # a saved student needs torch and transformers only
    triton = None

# Numbers of a tile of state in registers, of which 256 threads hold 8 each: compiled for an H100, nothing is spilled up
# to heads of 128 channels with complex modes (4,096, or 4 warps, spill).
TILE = 2048
RING_TILE = 32  # tokens of a window at a time
MODE_TILE = 8  # modes of each channel at a time, where a filter has one channel


def installed() -> bool:
    """Whether there is Triton."""
    return triton is not None


def step_in_triton(
    y, projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state,
    width, queries, groups, own_state, pairs, adjacent, scale, eps,
):  # fmt: skip
    """`step` of step.py, into y; `width` is that of a head, in `groups` of channels with a filter each."""
    batch, heads, part = len(projected), len(places), width // groups if groups else width
    columns = width if part == 1 else part
    poles, residues, direct, first, size = modes or [None] * 5
    padded = triton.next_power_of_2(columns)
    rows = triton.next_power_of_2(queries)
    _step[(batch * heads,)](
        y,
        projected,
        projected.stride(0),
        cos,
        sin,
        real,
        taps,
        *(norms or [None, None]),
        gates,
        0 if gates is None else gates.stride(0),
        _placed(tuple(places), projected.device),
        conv_state,
        *(near or [None] * 4),
        *(kept or [None] * 4),
        poles,
        residues,
        direct,
        first,
        size,
        state,
        _ticket(projected.device),
        HEADS=heads,
        QUERIES=queries,
        WIDTH=width,
        OTHERS=heads - (kept[0].shape[1] if kept else 0),
        TAPS=0 if taps is None else taps.shape[1],
        PAIRS=pairs,
        ADJACENT=adjacent,
        NEAR=near[0].shape[2] if near else 0,
        KEPT=kept[0].shape[2] if kept else 0,
        GROUPS=groups,
        PART=part,
        OWN=own_state,
        MODES=poles.shape[1] if modes else 0,
        COMPONENTS=len(poles) if modes else 0,
        SCALE=scale,
        EPS=eps,
        DOUBLE=projected.dtype == torch.float64,
        ROWS=rows,
        CHANNELS=triton.next_power_of_2(width),
        COLUMNS=padded,
        TILE_ROWS=min(padded, max(1, TILE // (rows * padded))),
        RING_TILE=RING_TILE,
        MODE_TILE=MODE_TILE,
        num_warps=8,
    )


@functools.cache
def _placed(places, device):
    return torch.tensor(places, device=device)


@functools.cache
def _ticket(device):
    """Counts the programs of a kernel that have ended: the last one moves the rings on, when all have read where."""
    return torch.zeros((), dtype=torch.int32, device=device)


if triton is not None:

    @triton.jit
    def _convolved(
        projected, taps, conv_state, row, channel, inside, streams, TAPS: tl.constexpr, ALL: tl.constexpr,
        WIDE: tl.constexpr,
    ):  # fmt: skip
        """The short convolution of these channels; a layer that keeps attention has none."""
        x = tl.load(projected + row * streams + channel, mask=inside, other=0).to(WIDE)
        if TAPS > 0:
            x *= tl.load(taps + channel * TAPS + TAPS - 1, mask=inside, other=0).to(WIDE)
            for t in tl.static_range(TAPS - 1):
                weight = tl.load(taps + channel * TAPS + t, mask=inside, other=0).to(WIDE)
                before = conv_state + (row * (TAPS - 1) + t) * ALL + channel
                x += weight * tl.load(before, mask=inside, other=0).to(WIDE)
        return x

    @triton.jit
    def _turned(
        projected, taps, conv_state, row, base, channel, inside, streams, cos, sin, norm, factor, TAPS: tl.constexpr,
        ALL: tl.constexpr, WIDTH: tl.constexpr, PAIRS: tl.constexpr, ADJACENT: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """q or k at channels of a head that begins at `base`: normalised by `factor`, and turned with their partner."""
        x = _convolved(projected, taps, conv_state, row, base + channel, inside, streams, TAPS, ALL, WIDE)
        if norm is not None:
            x *= factor * tl.load(norm + channel, mask=channel < WIDTH, other=0).to(WIDE)
        if PAIRS > 0:
            if ADJACENT:
                pair, leads, partner = channel // 2, channel % 2 == 0, channel ^ 1
            else:
                pair, leads = channel % PAIRS, channel < PAIRS
                partner = tl.where(leads, channel + PAIRS, channel - PAIRS)
            turns = channel < 2 * PAIRS
            has = inside & turns
            other = _convolved(projected, taps, conv_state, row, base + partner, has, streams, TAPS, ALL, WIDE)
            if norm is not None:
                other *= factor * tl.load(norm + partner, mask=turns, other=0).to(WIDE)
            c = tl.load(cos + row * PAIRS + pair, mask=turns, other=1).to(WIDE)
            s = tl.load(sin + row * PAIRS + pair, mask=turns, other=0).to(WIDE)
            x = x * c + tl.where(leads, -s, s) * other
        return x

    @triton.jit
    def _factor(
        projected, taps, conv_state, row, base, streams, norm, WIDTH: tl.constexpr, CHANNELS: tl.constexpr,
        TAPS: tl.constexpr, ALL: tl.constexpr, EPS: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """1 / root mean square of heads that begin at `base`, (head, 1); without a norm 1."""
        if norm is None:
            return tl.full(base.shape, 1, WIDE)
        channel = tl.arange(0, CHANNELS)[None]
        inside = (channel < WIDTH) & (base >= 0)
        x = _convolved(projected, taps, conv_state, row, base + channel, inside, streams, TAPS, ALL, WIDE)
        return 1 / tl.sqrt(tl.sum(x * x, 1)[:, None] / WIDTH + EPS)

    @triton.jit
    def _attended(
        q, k, v, keys, values, real, start, row, place, column, used, WINDOW: tl.constexpr, WIDTH: tl.constexpr,
        CHANNELS: tl.constexpr, RING_TILE: tl.constexpr, WIDE: tl.constexpr,
    ):  # fmt: skip
        """Softmax attention of the queries (query, channel) over a ring and the new token, for columns of the values.

        The new token takes the place of the oldest, which no query sees any more.
        """
        channel = tl.arange(0, CHANNELS)
        scale = 1 / tl.sqrt(tl.full((1,), WIDTH, WIDE))
        top = tl.sum(q * k, 1) * scale
        total = tl.full(top.shape, 1, WIDE)
        y = tl.zeros_like(top)[:, None] + v
        for begin in range(0, WINDOW, RING_TILE):
            token = begin + tl.arange(0, RING_TILE)
            seen = (token < WINDOW) & (token != place)
            seen = seen & (tl.load(real + row * WINDOW + token, mask=seen, other=0) != 0)
            at = (start + token[:, None]) * WIDTH
            old = tl.load(keys + at + channel, mask=seen[:, None] & (channel < WIDTH), other=0).to(WIDE)
            scores = tl.where(seen, tl.sum(q[:, None] * old[None], 2) * scale, float("-inf"))
            highest = tl.maximum(top, tl.max(scores, 1))
            shrunk, weight = tl.exp(top - highest), tl.exp(scores - highest[:, None])
            old = tl.load(values + at + column, mask=seen[:, None] & used, other=0).to(WIDE)
            y = y * shrunk[:, None] + tl.sum(weight[:, :, None] * old[None], 1)
            total = total * shrunk + tl.sum(weight, 1)
            top = highest
        return y / total[:, None]

    @triton.jit
    def _step(
        y, projected, streams, cos, sin, real, taps, q_norm, k_norm, gates, gate_stride, places, conv_state,
        near_keys, near_values, near_real, near_written, kept_keys, kept_values, kept_real, kept_written,
        poles, residues, direct, first, size, state, ticket,
        HEADS: tl.constexpr, QUERIES: tl.constexpr, WIDTH: tl.constexpr, OTHERS: tl.constexpr, TAPS: tl.constexpr,
        PAIRS: tl.constexpr, ADJACENT: tl.constexpr, NEAR: tl.constexpr, KEPT: tl.constexpr, GROUPS: tl.constexpr,
        PART: tl.constexpr, OWN: tl.constexpr, MODES: tl.constexpr, COMPONENTS: tl.constexpr, SCALE: tl.constexpr,
        EPS: tl.constexpr, DOUBLE: tl.constexpr, ROWS: tl.constexpr, CHANNELS: tl.constexpr, COLUMNS: tl.constexpr,
        TILE_ROWS: tl.constexpr, RING_TILE: tl.constexpr, MODE_TILE: tl.constexpr,
    ):  # fmt: skip
        row, head = (tl.program_id(0) // HEADS).to(tl.int64), tl.program_id(0) % HEADS
        WIDE: tl.constexpr = tl.float64 if DOUBLE else tl.float32
        INNER: tl.constexpr = HEADS * QUERIES * WIDTH
        ALL: tl.constexpr = INNER + 2 * HEADS * WIDTH
        k_base, v_base = INNER + head * WIDTH, INNER + (HEADS + head) * WIDTH
        query = tl.arange(0, ROWS)[:, None]
        is_query = query < QUERIES
        q_base = tl.where(is_query, (head * QUERIES + query) * WIDTH, -1)
        channel = tl.arange(0, CHANNELS)
        inside = channel < WIDTH
        column = tl.arange(0, COLUMNS)
        place = tl.load(places + head)

        q_factor = _factor(
            projected, taps, conv_state, row, q_base, streams, q_norm, WIDTH, CHANNELS, TAPS, ALL, EPS, WIDE
        )
        k_factor = _factor(
            projected, taps, conv_state, row, k_base + tl.zeros((1, 1), tl.int32), streams, k_norm, WIDTH, CHANNELS,
            TAPS, ALL, EPS, WIDE,
        )  # fmt: skip
        q = _turned(
            projected, taps, conv_state, row, q_base, channel[None], inside[None] & is_query, streams, cos, sin, q_norm,
            q_factor, TAPS, ALL, WIDTH, PAIRS, ADJACENT, WIDE,
        )  # fmt: skip
        k = _turned(
            projected, taps, conv_state, row, k_base, channel[None], inside[None], streams, cos, sin, k_norm, k_factor,
            TAPS, ALL, WIDTH, PAIRS, ADJACENT, WIDE,
        )  # fmt: skip
        v = _convolved(projected, taps, conv_state, row, v_base + channel, inside, streams, TAPS, ALL, WIDE)

        if place >= 0:
            if KEPT > 0:
                written = tl.load(kept_written) % KEPT
                start = (row * (HEADS - OTHERS) + place) * KEPT
                found = _attended(
                    q, k, v[None], kept_keys, kept_values, kept_real, start, row, written, channel, inside, KEPT, WIDTH,
                    CHANNELS, RING_TILE, WIDE,
                )  # fmt: skip
                at = row * INNER + (head * QUERIES + query) * WIDTH + channel[None]
                tl.store(y + at, found, mask=is_query & inside[None])
                tl.debug_barrier()
                at = (start + written) * WIDTH + channel
                tl.store(kept_keys + at, tl.sum(k, 0), mask=inside)
                tl.store(kept_values + at, v, mask=inside)
        else:
            own = -1 - place
            start, written = (row * OTHERS + own) * NEAR, tl.full((), 0, tl.int64)
            if NEAR > 0:
                written = tl.load(near_written) % NEAR
            left = (start + written) * WIDTH  # the token that leaves the window and enters the modes
            for group in range(GROUPS if 1 < PART and PART < WIDTH else 1):
                at = group * PART
                used = column < (WIDTH if PART == 1 else PART)
                out = tl.zeros((ROWS, COLUMNS), WIDE)
                if GROUPS > 0:
                    if NEAR > 0:
                        far_v = tl.load(near_values + left + at + column, mask=used, other=0).to(WIDE)
                    else:
                        far_v = _convolved(
                            projected, taps, conv_state, row, v_base + at + column, used, streams, TAPS, ALL, WIDE
                        )
                    if PART == 1:
                        if NEAR > 0:
                            far_k = tl.load(near_keys + left + column, mask=used, other=0).to(WIDE)
                        else:
                            far_k = tl.sum(k, 0)
                        added = far_k * far_v
                        for r in tl.static_range(QUERIES if OWN else 1):
                            filter = ((own * QUERIES + r) if OWN else own) * GROUPS + column
                            begin = tl.load(first + filter, mask=used, other=0)[:, None]
                            count = tl.load(size + filter, mask=used, other=0)[:, None]
                            read = added * tl.load(direct + filter, mask=used, other=0).to(WIDE)
                            for m in range(0, tl.max(tl.max(count, 1), 0), MODE_TILE):
                                mode = m + tl.arange(0, MODE_TILE)[None]
                                held = mode < count
                                mode = begin + mode
                                re_at = state + row * COMPONENTS * MODES + mode
                                pole = tl.load(poles + mode, mask=held, other=0).to(WIDE)
                                residue = tl.load(residues + mode, mask=held, other=0).to(WIDE)
                                re = tl.load(re_at, mask=held, other=0).to(WIDE)
                                new = pole * re + added[:, None]
                                sums = residue * new
                                if COMPONENTS == 2:
                                    pole_im = tl.load(poles + MODES + mode, mask=held, other=0).to(WIDE)
                                    residue_im = tl.load(residues + MODES + mode, mask=held, other=0).to(WIDE)
                                    im = tl.load(re_at + MODES, mask=held, other=0).to(WIDE)
                                    new -= pole_im * im
                                    im = pole * im + pole_im * re
                                    sums = residue * new - residue_im * im
                                    tl.store(re_at + MODES, im, mask=held)
                                tl.store(re_at, new, mask=held)
                                read += tl.sum(sums, 1)
                            mine = (query == r) if OWN else is_query
                            out += tl.where(mine, SCALE * q * read[None], 0)
                    else:
                        for r in tl.static_range(QUERIES if OWN else 1):
                            filter = ((own * QUERIES + r) if OWN else own) * GROUPS + group
                            mine = (query == r) if OWN else is_query
                            weight = tl.load(direct + filter).to(WIDE)
                            begin = tl.load(first + filter)
                            count = tl.load(size + filter)
                            for i in range(0, PART, TILE_ROWS):
                                line = i + tl.arange(0, TILE_ROWS)
                                present = line < PART
                                if NEAR > 0:
                                    far_k = tl.load(near_keys + left + at + line, mask=present, other=0).to(WIDE)
                                else:
                                    far_k = _turned(
                                        projected, taps, conv_state, row, k_base, at + line[None], present[None],
                                        streams, cos, sin, k_norm, k_factor, TAPS, ALL, WIDTH, PAIRS, ADJACENT, WIDE,
                                    )  # fmt: skip
                                    far_k = tl.sum(far_k, 0)
                                asked = SCALE * _turned(
                                    projected, taps, conv_state, row, q_base, at + line[None], present[None] & mine,
                                    streams, cos, sin, q_norm, q_factor, TAPS, ALL, WIDTH, PAIRS, ADJACENT, WIDE,
                                )  # fmt: skip
                                added = far_k[:, None] * far_v[None]
                                out += tl.sum(asked * far_k[None], 1)[:, None] * weight * far_v[None]
                                cell = line[:, None] * PART + column[None]
                                held = present[:, None] & used[None]
                                for m in range(begin, begin + count):
                                    re_at = state + (row * MODES + m) * COMPONENTS * PART * PART + cell
                                    pole, residue = tl.load(poles + m).to(WIDE), tl.load(residues + m).to(WIDE)
                                    re = tl.load(re_at, mask=held, other=0).to(WIDE)
                                    new = pole * re + added
                                    read = residue * new
                                    if COMPONENTS == 2:
                                        pole_im = tl.load(poles + MODES + m).to(WIDE)
                                        im = tl.load(re_at + PART * PART, mask=held, other=0).to(WIDE)
                                        new -= pole_im * im
                                        im = pole * im + pole_im * re
                                        read = residue * new - tl.load(residues + MODES + m).to(WIDE) * im
                                        tl.store(re_at + PART * PART, im, mask=held)
                                    tl.store(re_at, new, mask=held)
                                    out += tl.sum(asked[:, :, None] * read[None], 1)
                if NEAR > 0:
                    new_v = _convolved(
                        projected, taps, conv_state, row, v_base + at + column, used, streams, TAPS, ALL, WIDE
                    )
                    close = _attended(
                        q, k, new_v[None], near_keys, near_values, near_real, start, row, written, at + column, used,
                        NEAR, WIDTH, CHANNELS, RING_TILE, WIDE,
                    )  # fmt: skip
                    if GROUPS > 0:
                        gate = gates + row * gate_stride + own * QUERIES + query
                        open = tl.load(gate, mask=is_query, other=0).to(WIDE)
                        ajar = tl.load(gate + OTHERS * QUERIES, mask=is_query, other=0).to(WIDE)
                        out = 2 * close / (1 + tl.exp(-open)) + 2 * out / (1 + tl.exp(-ajar))
                    else:
                        out = close
                place_of = row * INNER + (head * QUERIES + query) * WIDTH + at + column[None]
                tl.store(y + place_of, out, mask=is_query & used[None])
            tl.debug_barrier()
            if NEAR > 0:
                tl.store(near_keys + left + channel, tl.sum(k, 0), mask=inside)
                tl.store(near_values + left + channel, v, mask=inside)

        if TAPS > 1:
            tl.debug_barrier()
            for stream in tl.static_range(QUERIES + 2):
                if stream < QUERIES:
                    base = (head * QUERIES + stream) * WIDTH
                else:
                    base = k_base if stream == QUERIES else v_base
                kept_at = conv_state + row * (TAPS - 1) * ALL + base + channel
                for t in tl.static_range(TAPS - 2):
                    later = tl.load(kept_at + (t + 1) * ALL, mask=inside)
                    tl.store(kept_at + t * ALL, later, mask=inside)
                now = tl.load(projected + row * streams + base + channel, mask=inside)
                tl.store(kept_at + (TAPS - 2) * ALL, now, mask=inside)

        # Every program counts the new token as real, whatever stands here, so this may come early or late.
        is_real = True
        if real is not None:
            is_real = tl.load(real + row) != 0
        if head == 0:
            if NEAR > 0:
                tl.store(near_real + row * NEAR + tl.load(near_written) % NEAR, is_real)
            if KEPT > 0:
                tl.store(kept_real + row * KEPT + tl.load(kept_written) % KEPT, is_real)
        if NEAR > 0 or KEPT > 0:
            tl.debug_barrier()
            if tl.atomic_add(ticket, 1) == tl.num_programs(0) - 1:
                tl.store(ticket, 0)
                if NEAR > 0:
                    tl.store(near_written, tl.load(near_written) + 1)
                if KEPT > 0:
                    tl.store(kept_written, tl.load(kept_written) + 1)
