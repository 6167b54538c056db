"""A window of softmax attention and the filters beyond it in one pass over keys and values, on a GPU.

    y_t = g_t softmax_{t-W<s≤t}(c q_t · k_s) v_s + g'_t Σ_{s≤t-W} h_{t-W-s} c (q_t · k_s) v_s        g = 2 σ(gates)

A tile of BLOCK × BLOCK scores is computed once. Where it lies within the window its weights are those of an online
softmax (arXiv:2307.08691, algorithm 1), beyond it the scores times taps; a tile across the edge has both. Backward, all
weights of a tile multiply the same v_s · dy_t, so window and filters share their products. One kernel computes y; one
the gradients of q and the gates, row by row; one those of k and v, column by column; and the gradient of the taps is
that of the product without a window (toeplitz_triton.py) on keys and values W tokens late. Memory is linear in the
length. Without filters it is the window alone, y_t = softmax_{t-W<s≤t}(c q_t · k_s) v_s.

The plain forms are `attention.attention` and `convolution.ToeplitzProduct`, one after the other.
"""

import re

import torch
from torch import Tensor, library

from .toeplitz_triton import dense, empty, load, sizes_for, store, taps_gradient, taps_of


try:  # transformers takes only imports outside of `try` for packages that a student needs
    import triton
    import triton.language as tl
except ImportError:
    raise


LOG2_E = 1.4426950408889634  # exponentials are powers of 2


@triton.jit
def _gate(gates, rows, length):
    """2 σ(gate) of rows, to whose first gate `gates` points."""
    return 2 * tl.sigmoid(tl.load(gates, mask=rows < length, other=0.0).to(tl.float32))


@triton.jit
def _seen(
    near, best, mass, far,
    own, k, k_row, v, v_row, start, taps, distance, window, length, width, scale, LOG2_E: tl.constexpr,
    NEAR: tl.constexpr, FAR: tl.constexpr,
    BLOCK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What rows see of a tile of columns from `start` on, added to the sums so far.

    best is the highest score of each row in the window, near = Σ 2^(score - best) v and mass the sum of these weights.
    """
    keys = load(k + tl.cast(start, tl.int64) * k_row, k_row, start, length, width, BLOCK, N)
    values = load(v + tl.cast(start, tl.int64) * v_row, v_row, start, length, width, BLOCK, N)
    scores = tl.dot(own, tl.trans(keys), input_precision=PRECISION) * scale
    distance -= start
    if NEAR:
        within = tl.where((distance >= 0) & (distance < window), scores * LOG2_E, float("-inf"))
        higher = tl.maximum(best, tl.max(within, 1))
        weights, kept = tl.exp2(within - higher[:, None]), tl.exp2(best - higher)
        mass = mass * kept + tl.sum(weights, 1)
        near = tl.dot(weights.to(values.dtype), values, near * kept[:, None], input_precision=PRECISION)
        best = higher
    if FAR:
        beyond = scores * taps_of(taps, distance - window, length - window)
        far = tl.dot(beyond.to(values.dtype), values, far, input_precision=PRECISION)
    return near, best, mass, far


@triton.jit
def _rows(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    gates, gates_batch, gates_row,
    y, near_part, far_part, y_batch, y_filter, y_query, y_row,
    masses, taps, taps_filter, window, scale, filters, queries, length, width, LOG2_E: tl.constexpr,
    FAR: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y, its two parts before their gates and log2 Σ_s 2^score of the window, for one block of rows of one head."""
    blocks = tl.cdiv(length, BLOCK)
    head, first = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK  # the longest sum first
    head = head.to(tl.int64)
    batch, filter, query = head // queries // filters, head // queries % filters, head % queries
    skipped, rows = first.to(tl.int64), first + tl.arange(0, BLOCK)
    k += batch * k_batch + filter * k_filter
    v += batch * v_batch + filter * v_filter
    own = load(q + batch * q_batch + filter * q_filter + query * q_query + skipped * q_row, q_row, first, length, width,
               BLOCK, N)  # fmt: skip
    distance = rows[:, None] - tl.arange(0, BLOCK)[None, :]
    near, far = tl.zeros((BLOCK, N), tl.float32), tl.zeros((BLOCK, N), tl.float32)
    # -1e30 and not -∞, since -∞ - -∞ would be NaN.
    best, mass = tl.full((BLOCK,), -1e30, tl.float32), tl.zeros((BLOCK,), tl.float32)
    begin = tl.maximum(0, first - window + 1) // BLOCK * BLOCK  # the first tile that the window reaches
    edge = tl.maximum(0, first + 2 * BLOCK - 1 - window) // BLOCK * BLOCK  # the first tile wholly inside it
    if FAR:
        taps += filter * taps_filter
        for start in range(0, begin, BLOCK):
            near, best, mass, far = _seen(
                near, best, mass, far, own, k, k_row, v, v_row, start, taps, distance, window, length, width, scale,
                LOG2_E, False, True, BLOCK, N, PRECISION,
            )  # fmt: skip
        for start in range(begin, edge, BLOCK):
            near, best, mass, far = _seen(
                near, best, mass, far, own, k, k_row, v, v_row, start, taps, distance, window, length, width, scale,
                LOG2_E, True, True, BLOCK, N, PRECISION,
            )  # fmt: skip
        begin = edge
    for start in range(begin, first + BLOCK, BLOCK):
        near, best, mass, far = _seen(
            near, best, mass, far, own, k, k_row, v, v_row, start, taps, distance, window, length, width, scale,
            LOG2_E, True, False, BLOCK, N, PRECISION,
        )  # fmt: skip
    near = near / mass[:, None]
    tl.store(masses + head * length + rows, best + tl.log2(mass), mask=rows < length)
    place = batch * y_batch + filter * y_filter + query * y_query + skipped * y_row
    if FAR:
        gates += batch * gates_batch + rows.to(tl.int64) * gates_row + filter * queries + query
        store(near_part + place, y_row, first, length, width, near, BLOCK, N)
        store(far_part + place, y_row, first, length, width, far, BLOCK, N)
        near = _gate(gates, rows, length)[:, None] * near
        near += _gate(gates + filters * queries, rows, length)[:, None] * far
    store(y + place, y_row, first, length, width, near, BLOCK, N)


@triton.jit
def _softmax(scores, distance, masses, window, scale, LOG2_E: tl.constexpr):
    """The window's softmax of a tile; scores are q · k, masses log2 of the denominators."""
    within = (distance >= 0) & (distance < window)
    return tl.exp2(tl.where(within, scores * (scale * LOG2_E) - masses, float("-inf")))


@triton.jit
def _row_gradients(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    gates, gates_batch, gates_row,
    dy, dy_batch, dy_filter, dy_query, dy_row,
    dq, near_part, far_part, to_far, y_batch, y_filter, y_query, y_row,
    dgates, dots, masses, taps, taps_filter, window, scale, filters, queries, length, width, LOG2_E: tl.constexpr,
    FAR: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, the gates' gradients, g' dy and the softmax's own dot product g (near · dy), for a block of rows."""
    blocks = tl.cdiv(length, BLOCK)
    head, first = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK
    head = head.to(tl.int64)
    batch, filter, query = head // queries // filters, head // queries % filters, head % queries
    skipped, rows = first.to(tl.int64), first + tl.arange(0, BLOCK)
    k += batch * k_batch + filter * k_filter
    v += batch * v_batch + filter * v_filter
    own = load(q + batch * q_batch + filter * q_filter + query * q_query + skipped * q_row, q_row, first, length, width,
               BLOCK, N)  # fmt: skip
    slope = load(dy + batch * dy_batch + filter * dy_filter + query * dy_query + skipped * dy_row, dy_row, first,
                 length, width, BLOCK, N)  # fmt: skip
    place = batch * y_batch + filter * y_filter + query * y_query + skipped * y_row
    near = load(near_part + place, y_row, first, length, width, BLOCK, N).to(tl.float32)
    gate, far_gate = tl.full((BLOCK,), 1.0, tl.float32), tl.zeros((BLOCK,), tl.float32)
    dot = tl.sum(near * slope.to(tl.float32), 1)
    if FAR:
        taps += filter * taps_filter
        channel = filter * queries + query
        gates += batch * gates_batch + rows.to(tl.int64) * gates_row + channel
        dgates += (batch * length + rows.to(tl.int64)) * 2 * filters * queries + channel
        far = load(far_part + place, y_row, first, length, width, BLOCK, N).to(tl.float32)
        gate, far_gate = _gate(gates, rows, length), _gate(gates + filters * queries, rows, length)
        store(to_far + place, y_row, first, length, width, far_gate[:, None] * slope.to(tl.float32), BLOCK, N)
        # The slope of 2 σ(x) is 2 σ(x) (1 - σ(x)).
        far_dot = tl.sum(far * slope.to(tl.float32), 1)
        kind = dgates.dtype.element_ty
        tl.store(dgates, (dot * gate * (1 - gate / 2)).to(kind), mask=rows < length)
        dgates += filters * queries
        tl.store(dgates, (far_dot * far_gate * (1 - far_gate / 2)).to(kind), mask=rows < length)
    dot *= gate
    tl.store(dots + head * length + rows, dot, mask=rows < length)
    own_masses = tl.load(masses + head * length + rows, mask=rows < length, other=0.0)
    distance = rows[:, None] - tl.arange(0, BLOCK)[None, :]
    total = tl.zeros((BLOCK, N), tl.float32)
    begin = tl.maximum(0, first - window + 1) // BLOCK * BLOCK
    if FAR:
        for start in range(0, begin, BLOCK):
            keys = load(k + tl.cast(start, tl.int64) * k_row, k_row, start, length, width, BLOCK, N)
            values = load(v + tl.cast(start, tl.int64) * v_row, v_row, start, length, width, BLOCK, N)
            matrix = taps_of(taps, distance - start - window, length - window) * far_gate[:, None]
            matrix *= tl.dot(slope, tl.trans(values), input_precision=PRECISION)
            total = tl.dot(matrix.to(keys.dtype), keys, total, input_precision=PRECISION)
    for start in range(begin, first + BLOCK, BLOCK):
        keys = load(k + tl.cast(start, tl.int64) * k_row, k_row, start, length, width, BLOCK, N)
        values = load(v + tl.cast(start, tl.int64) * v_row, v_row, start, length, width, BLOCK, N)
        scores = tl.dot(own, tl.trans(keys), input_precision=PRECISION)
        slopes = tl.dot(slope, tl.trans(values), input_precision=PRECISION)
        softmax = _softmax(scores, distance - start, own_masses[:, None], window, scale, LOG2_E)
        to_scores = softmax * (gate[:, None] * slopes - dot[:, None])
        if FAR:
            matrix = taps_of(taps, distance - start - window, length - window)
            to_scores += matrix * far_gate[:, None] * slopes
        total = tl.dot(to_scores.to(keys.dtype), keys, total, input_precision=PRECISION)
    store(dq + place, y_row, first, length, width, total * scale, BLOCK, N)


@triton.jit
def _column_gradients(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    gates, gates_batch, gates_row,
    dy, dy_batch, dy_filter, dy_query, dy_row,
    dk, dv, dk_batch, dk_filter, dk_row,
    dots, masses, taps, taps_filter, window, scale, filters, queries, length, width, LOG2_E: tl.constexpr,
    FAR: tl.constexpr, BLOCK: tl.constexpr, N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv, also over the queries, for one block of columns of one filter; tiles are (column, row)."""
    blocks = tl.cdiv(length, BLOCK)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    head = head.to(tl.int64)
    batch, filter, skipped = head // filters, head % filters, first.to(tl.int64)
    q += batch * q_batch + filter * q_filter
    dy += batch * dy_batch + filter * dy_filter
    keys = load(k + batch * k_batch + filter * k_filter + skipped * k_row, k_row, first, length, width, BLOCK, N)
    values = load(v + batch * v_batch + filter * v_filter + skipped * v_row, v_row, first, length, width, BLOCK, N)
    taps += filter * taps_filter
    gates += batch * gates_batch + filter * queries
    ROWS: tl.constexpr = BLOCK // 2  # with as many as columns a tile's numbers would not fit into registers
    row = tl.arange(0, ROWS)
    distance = row[None, :] - tl.arange(0, BLOCK)[:, None] - first
    to_keys, to_values = tl.zeros((BLOCK, N), tl.float32), tl.zeros((BLOCK, N), tl.float32)
    end = tl.minimum(length, first + (window + BLOCK + ROWS - 2) // ROWS * ROWS)  # where no row's window reaches
    for query in range(queries):
        one = (head * queries + query) * length
        for start in range(first, length if FAR else end, ROWS):
            rows, place = start + row, tl.cast(start, tl.int64)
            own = load(q + query * q_query + place * q_row, q_row, start, length, width, ROWS, N)
            slope = load(dy + query * dy_query + place * dy_row, dy_row, start, length, width, ROWS, N)
            scores = tl.dot(keys, tl.trans(own), input_precision=PRECISION)
            slopes = tl.dot(values, tl.trans(slope), input_precision=PRECISION)
            weights, to_scores = tl.zeros_like(scores), tl.zeros_like(scores)
            own_gates = gates + rows.to(tl.int64) * gates_row + query
            if start < end:
                own_masses = tl.load(masses + one + rows, mask=rows < length, other=0.0)
                dot = tl.load(dots + one + rows, mask=rows < length, other=0.0)
                softmax = _softmax(scores, distance + start, own_masses[None, :], window, scale, LOG2_E)
                weights = softmax
                if FAR:
                    weights *= _gate(own_gates, rows, length)[None, :]
                to_scores = weights * slopes - softmax * dot[None, :]
            if FAR:
                far_gate = _gate(own_gates + filters * queries, rows, length)
                matrix = taps_of(taps, distance + start - window, length - window) * far_gate[None, :]
                weights += matrix * scale * scores
                to_scores += matrix * slopes
            to_values = tl.dot(weights.to(slope.dtype), slope, to_values, input_precision=PRECISION)
            to_keys = tl.dot(to_scores.to(own.dtype), own, to_keys, input_precision=PRECISION)
    place = batch * dk_batch + filter * dk_filter + skipped * dk_row
    store(dk + place, dk_row, first, length, width, to_keys * scale, BLOCK, N)
    store(dv + place, dk_row, first, length, width, to_values, BLOCK, N)


# Named after the module, as this file can be loaded twice, from the package and from a checkpoint.
NAMESPACE = re.sub(r"\W", "_", __name__)


@library.custom_op(f"{NAMESPACE}::near_and_far", mutates_args=())
def near_and_far(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, width)
    taps: Tensor | None,  # (filter, length - window or more), of any dtype; None: the window alone
    gates: Tensor | None,  # (batch, length, 2 · filter · query): of the window, then of the filters
    window: int,  # less than the length
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y (batch, filter, query, length, width), and for its gradient: the window's part of it, that of the filters, and
    log2 of the softmax's denominators. q, k and v are of one dtype of 32 bits or fewer, sums in float32."""
    q, k, v, taps, gates = dense(q, k, v, taps, gates)
    y, near, far, masses = _outputs(q, taps)
    with torch.cuda.device_of(q):
        _launch(
            _rows, q[..., 0, 0].numel(), (q, k, v), gates, [y, near, far, *_strides(y), masses], taps, window, scale
        )
    return y, near, far, masses


@near_and_far.register_fake
def _(q, k, v, taps, gates, window, scale):
    return _outputs(q, taps)


@library.custom_op(f"{NAMESPACE}::near_and_far_gradients", mutates_args=())
def near_and_far_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    taps: Tensor | None,
    gates: Tensor | None,
    near: Tensor,
    far: Tensor,
    masses: Tensor,
    dy: Tensor,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v, taps and gates; of taps and gates that are not there, nothing."""
    q, k, v, taps, gates, dy = dense(q, k, v, taps, gates, dy)
    dq, to_far = empty(q, q.shape[-1]), q.new_empty(0) if taps is None else empty(q, q.shape[-1])
    dk, dv = (empty(k, k.shape[-1]) for _ in range(2))
    dtaps, dgates = (q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (taps, gates))
    # Saved tensors may come back in another layout, as from a hook that moves them to the host.
    near, far = (
        x if x.stride() == dq.stride() or x.numel() == 0 else torch.empty_like(dq).copy_(x) for x in (near, far)
    )
    dots = torch.empty_like(masses)
    slope = [dy, *_strides(dy)]
    with torch.cuda.device_of(q):
        rows = [*slope, dq, near, far, to_far, *_strides(dq), dgates, dots, masses]
        _launch(_row_gradients, q[..., 0, 0].numel(), (q, k, v), gates, rows, taps, window, scale)
        columns = [*slope, dk, dv, *_strides(dk), dots, masses]
        _launch(_column_gradients, k[..., 0, 0].numel(), (q, k, v), gates, columns, taps, window, scale)
        if taps is not None:
            late = slice(0, k.shape[2] - window)
            late = taps_gradient(q[:, :, :, window:], k[:, :, late], v[:, :, late], to_far[:, :, :, window:], taps)
            dtaps = scale * late
    return dq, dk, dv, dtaps, dgates


@near_and_far_gradients.register_fake
def _(q, k, v, taps, gates, near, far, masses, dy, window, scale):
    grads = [empty(x, x.shape[-1]) for x in (q, k, k)]
    return *grads, *(q.new_empty(0) if x is None else x.new_empty(x.shape) for x in (taps, gates))


def _save(ctx, inputs, output):
    *tensors, ctx.window, ctx.scale = inputs
    y, near, far, masses = output
    ctx.filtered = tensors[3] is not None
    ctx.save_for_backward(*tensors, near if ctx.filtered else y, far, masses)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy, *others):
    *grads, dtaps, dgates = near_and_far_gradients(*ctx.saved_tensors, dy, ctx.window, ctx.scale)
    return *grads, *((dtaps, dgates) if ctx.filtered else (None, None)), None, None


near_and_far.register_autograd(_backward, setup_context=_save)


def _outputs(q, taps):
    y = empty(q, q.shape[-1])
    near, far = (q.new_empty(0) if taps is None else torch.empty_like(y) for _ in range(2))
    return y, near, far, q.new_empty(q.shape[:-1], dtype=torch.float32)


def _strides(x):
    return x.stride()[:-1]


def _launch(kernel, heads, matrices, gates, others, taps, window, scale):
    """Run a kernel on q, k, v and what stands for its other tensors: a program for each block of rows of `heads`."""
    q, _, v = matrices
    sizes = sizes_for(q, v)
    del sizes["M"]
    strided = [argument for x in matrices for argument in (x, *_strides(x))]
    # An absent tensor is replaced by q, which no kernel reads in its place.
    gated = (q, 0, 0) if gates is None else (gates, *_strides(gates))
    filtered = (q, 0) if taps is None else (taps, taps.stride(0))
    grid = (heads * triton.cdiv(q.shape[3], sizes["BLOCK"]),)
    kernel[grid](
        *strided, *gated, *others, *filtered, window, scale, *q.shape[1:], LOG2_E=LOG2_E, FAR=taps is not None, **sizes
    )
