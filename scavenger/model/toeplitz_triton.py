"""The product of multihyena on a GPU, y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s: flash attention without a softmax.

Scores and their gradients exist in tiles of BLOCK × BLOCK in registers only, so memory is linear in the length. One
kernel computes y and three its gradients, each of which computes the scores again: dq is the same sum with other
factors, dk and dv are sums over rows, and the gradient of the taps is one over all pairs of blocks at a distance. The
plain form is `convolution.ToeplitzProduct`. Source of the tiling: arXiv:2307.08691, algorithms 1 and 2.

A tile of T_ts = h_{t-s} is loaded from the taps by computed index: neighbouring threads read neighbouring taps, and the
2 · BLOCK - 1 different ones stay in the L1 cache, where a table of ready tiles would be read from L2 at best.
"""

import re

import torch
from torch import Tensor, library
from torch.nn import functional as F

from .convolution import along_lags


try:  # transformers takes only imports outside of `try` for packages that a student needs
    import triton
    import triton.language as tl
except ImportError:
    raise


ROW_BYTES = 512  # of q, k and v at most: tiles of 32 rows fit into the 99 KiB that any multiprocessor can share
# Programs of the taps' gradient, one for each filter and distance of blocks: where there are fewer, each takes only a
# part of the batch. A few for each of about 130 multiprocessors.
LAG_PROGRAMS = 1024


@triton.jit
def load(matrix, stride, first, rows, columns, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    """BLOCK rows of a matrix (rows, columns) from row `first` on, which `matrix` points to; zero outside."""
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    return tl.load(matrix + row * stride + column, mask=(first + row < rows) & (column < columns), other=0.0)


@triton.jit
def store(matrix, stride, first, rows, columns, values, BLOCK: tl.constexpr, WIDTH: tl.constexpr):
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (first + row < rows) & (column < columns)
    tl.store(matrix + row * stride + column, values.to(matrix.dtype.element_ty), mask=inside)


@triton.jit
def taps_of(taps, lag, length):
    """T_ts of a tile of lags t - s."""
    return tl.load(taps + lag, mask=(lag >= 0) & (lag < length), other=0.0).to(tl.float32)


@triton.jit
def _product(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    y, y_batch, y_filter, y_query, y_row,
    taps, taps_filter, filters, queries, length, width, value_width,
    BLOCK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s for one block of rows t, one query, filter and sequence."""
    blocks = tl.cdiv(length, BLOCK)
    head, first = tl.program_id(0) // blocks, (blocks - 1 - tl.program_id(0) % blocks) * BLOCK  # the longest sum first
    head = head.to(tl.int64)
    batch, filter, query = head // queries // filters, head // queries % filters, head % queries
    q += batch * q_batch + filter * q_filter + query * q_query + first.to(tl.int64) * q_row
    y += batch * y_batch + filter * y_filter + query * y_query + first.to(tl.int64) * y_row
    k += batch * k_batch + filter * k_filter
    v += batch * v_batch + filter * v_filter
    taps += filter * taps_filter
    lag = first + tl.arange(0, BLOCK)[:, None] - tl.arange(0, BLOCK)[None, :]
    own = load(q, q_row, first, length, width, BLOCK, N)
    total = tl.zeros((BLOCK, M), tl.float32)
    for start in range(0, first + BLOCK, BLOCK):
        keys = load(k, k_row, start, length, width, BLOCK, N)
        values = load(v, v_row, start, length, value_width, BLOCK, M)
        scores = tl.dot(own, tl.trans(keys), input_precision=PRECISION) * taps_of(taps, lag - start, length)
        total = tl.dot(scores.to(values.dtype), values, total, input_precision=PRECISION)
        k += BLOCK * k_row
        v += BLOCK * v_row
    store(y, y_row, first, length, value_width, total, BLOCK, M)


@triton.jit
def _columns(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    dy, dy_batch, dy_filter, dy_query, dy_row,
    dk, dk_batch, dk_filter, dk_row,
    dv, dv_batch, dv_filter, dv_row,
    taps, taps_filter, filters, queries, length, width, value_width,
    BLOCK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk_s = Σ_{t≥s} h_{t-s} (v_s · dy_t) q_t and dv_s = Σ_{t≥s} h_{t-s} (k_s · q_t) dy_t, also over the queries.

    For one block of columns s, one filter and sequence; tiles are (column, row).
    """
    blocks = tl.cdiv(length, BLOCK)
    head, first = tl.program_id(0) // blocks, tl.program_id(0) % blocks * BLOCK
    head = head.to(tl.int64)
    batch, filter, skipped = head // filters, head % filters, first.to(tl.int64)
    q += batch * q_batch + filter * q_filter + skipped * q_row
    dy += batch * dy_batch + filter * dy_filter + skipped * dy_row
    k += batch * k_batch + filter * k_filter + skipped * k_row
    v += batch * v_batch + filter * v_filter + skipped * v_row
    dk += batch * dk_batch + filter * dk_filter + skipped * dk_row
    dv += batch * dv_batch + filter * dv_filter + skipped * dv_row
    taps += filter * taps_filter
    lag = tl.arange(0, BLOCK)[None, :] - tl.arange(0, BLOCK)[:, None]
    keys = load(k, k_row, first, length, width, BLOCK, N)
    values = load(v, v_row, first, length, value_width, BLOCK, M)
    to_keys, to_values = tl.zeros((BLOCK, N), tl.float32), tl.zeros((BLOCK, M), tl.float32)
    for query in range(queries):
        q_rows, dy_rows = q + query * q_query, dy + query * dy_query
        for start in range(first, length, BLOCK):
            own = load(q_rows, q_row, start, length, width, BLOCK, N)
            slope = load(dy_rows, dy_row, start, length, value_width, BLOCK, M)
            matrix = taps_of(taps, lag + (start - first), length)
            scores = tl.dot(keys, tl.trans(own), input_precision=PRECISION) * matrix
            to_values = tl.dot(scores.to(slope.dtype), slope, to_values, input_precision=PRECISION)
            weights = tl.dot(values, tl.trans(slope), input_precision=PRECISION) * matrix
            to_keys = tl.dot(weights.to(own.dtype), own, to_keys, input_precision=PRECISION)
            q_rows += BLOCK * q_row
            dy_rows += BLOCK * dy_row
    store(dk, dk_row, first, length, width, to_keys, BLOCK, N)
    store(dv, dv_row, first, length, value_width, to_values, BLOCK, M)


@triton.jit
def _lags(
    q, q_batch, q_filter, q_query, q_row,
    k, k_batch, k_filter, k_row,
    v, v_batch, v_filter, v_row,
    dy, dy_batch, dy_filter, dy_query, dy_row,
    table, parts, batches, filters, queries, length, width, value_width,
    BLOCK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ (q_t · k_s) (dy_t · v_s) over all pairs of blocks at one distance, for one filter and part of the batch.

    `table` is (filter, part, row, column): the lags of a tile's places are those of the last BLOCK rows of a matrix.
    """
    blocks = tl.cdiv(length, BLOCK)
    distance, part = tl.program_id(0) % blocks, tl.program_id(0) // blocks
    filter, part = (part // parts).to(tl.int64), part % parts
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for item in range(part, batches * queries, parts):
        batch, query = tl.cast(item // queries, tl.int64), item % queries
        skipped = (distance * BLOCK).to(tl.int64)
        q_rows = q + batch * q_batch + filter * q_filter + query * q_query + skipped * q_row
        dy_rows = dy + batch * dy_batch + filter * dy_filter + query * dy_query + skipped * dy_row
        k_rows = k + batch * k_batch + filter * k_filter
        v_rows = v + batch * v_batch + filter * v_filter
        for start in range(distance * BLOCK, length, BLOCK):
            own = load(q_rows, q_row, start, length, width, BLOCK, N)
            slope = load(dy_rows, dy_row, start, length, value_width, BLOCK, M)
            keys = load(k_rows, k_row, start - distance * BLOCK, length, width, BLOCK, N)
            values = load(v_rows, v_row, start - distance * BLOCK, length, value_width, BLOCK, M)
            scores = tl.dot(own, tl.trans(keys), input_precision=PRECISION)
            total += scores * tl.dot(slope, tl.trans(values), input_precision=PRECISION)
            q_rows += BLOCK * q_row
            dy_rows += BLOCK * dy_row
            k_rows += BLOCK * k_row
            v_rows += BLOCK * v_row
    columns = blocks * BLOCK
    row, column = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    table += (filter * parts + part) * BLOCK * columns + (blocks - 1 - distance) * BLOCK
    tl.store(table + row * columns + column, total)


# Named after the module, as this file can be loaded twice, from the package and from a checkpoint.
NAMESPACE = re.sub(r"\W", "_", __name__)


@library.custom_op(f"{NAMESPACE}::toeplitz_product", mutates_args=())
def toeplitz_product(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, value width)
    taps: Tensor,  # (filter, length or more), of any dtype
) -> Tensor:  # (batch, filter, query, length, value width)
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s; q, k and v of one dtype of 32 bits or fewer, sums in float32."""
    q, k, v, taps = dense(q, k, v, taps)
    y = empty(q, v.shape[-1])
    with torch.cuda.device_of(q):
        _launch(_product, q[..., 0, 0].numel(), (q, k, v, y), taps, taps.stride(0))
    return y


@toeplitz_product.register_fake
def _(q, k, v, taps):
    return empty(q, v.shape[-1])


@library.custom_op(f"{NAMESPACE}::toeplitz_gradients", mutates_args=())
def toeplitz_gradients(
    q: Tensor, k: Tensor, v: Tensor, taps: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and taps."""
    batch, filters, queries = q.shape[:3]
    q, k, v, taps, dy = dense(q, k, v, taps, dy)
    dq, dk, dv = (empty(x, x.shape[-1]) for x in (q, k, v))
    with torch.cuda.device_of(q):
        _launch(_product, batch * filters * queries, (dy, v, k, dq), taps, taps.stride(0))
        _launch(_columns, batch * filters, (q, k, v, dy, dk, dv), taps, taps.stride(0))
        dtaps = taps_gradient(q, k, v, dy, taps)
    return dq, dk, dv, dtaps


def taps_gradient(q: Tensor, k: Tensor, v: Tensor, dy: Tensor, taps: Tensor) -> Tensor:
    """The gradient of the taps alone, by one kernel."""
    batch, filters, queries, length, _ = q.shape
    block = sizes_for(q, v)["BLOCK"]
    blocks = triton.cdiv(length, block)
    parts = max(1, min(LAG_PROGRAMS // (filters * blocks), batch * queries))
    table = q.new_empty(filters, parts, block, blocks * block, dtype=torch.float32)
    _launch(_lags, filters * parts, (q, k, v, dy), table, parts, batch)
    dtaps = along_lags(table.sum(1))[:, :length]
    return F.pad(dtaps, (0, taps.shape[1] - length)).to(taps.dtype)


@toeplitz_gradients.register_fake
def _(q, k, v, taps, dy):
    return *(empty(x, x.shape[-1]) for x in (q, k, v)), taps.new_empty(taps.shape)


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, dy):
    return toeplitz_gradients(*ctx.saved_tensors, dy)


toeplitz_product.register_autograd(_backward, setup_context=_save)


def takes(v: Tensor, width: int) -> bool:
    """Whether the kernels are for these values and keys of this width: on a GPU, rows of ROW_BYTES or less."""
    widest = triton.next_power_of_2(max(width, v.shape[-1]))
    return v.is_cuda and v.dtype != torch.float64 and widest * v.element_size() <= ROW_BYTES


def dense(*tensors):
    """The tensors, with the numbers of their last axis next to each other in memory; None stays None."""
    return [x if x is None or x.stride(-1) == 1 else x.contiguous() for x in tensors]


def empty(x, width):
    """A tensor as x of another width, in memory (batch, length, filter, …): as the projections write and read it."""
    return x.new_empty(*x.movedim(-2, 1).shape[:-1], width).movedim(1, -2)


def sizes_for(q, v):
    """The constants of the kernels: with these, few registers are spilled on GPUs of compute capability 8 and 9."""
    N, M = (max(16, triton.next_power_of_2(x.shape[-1])) for x in (q, v))  # 16: the least that tl.dot takes
    half, wider = q.element_size() == 2, max(N, M)
    exact = torch.get_float32_matmul_precision() == "highest"
    return {
        "BLOCK": 64 if half and wider <= 128 else 32,
        "N": N,
        "M": M,
        "PRECISION": "ieee" if exact else "tf32",
        "num_warps": 4 if wider * q.element_size() <= 128 else 8,
        "num_stages": 2,
    }


def _launch(kernel, heads, matrices, *others):
    """Run a kernel on q, k, v, … or what stands for them: one program for each block of rows of `heads` heads."""
    q, _, v, *_ = matrices
    sizes = sizes_for(q, v)
    strided = [argument for x in matrices for argument in (x, *x.stride()[:-1])]
    shape = (*q.shape[1:], v.shape[-1])
    kernel[(heads * triton.cdiv(q.shape[3], sizes["BLOCK"]),)](*strided, *others, *shape, **sizes)
