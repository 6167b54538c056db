"""Causal convolutions: long ones by FFT or Toeplitz matrices, short ones with the state that decoding needs."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .toeplitz_cpp import gradients, pays, product


BLOCK = 128  # query positions of one Toeplitz block: few enough that its scores stay in the CPU cache
GPU_SCORES = 2**27  # of one block on a GPU, where many small kernels cost more than scores that count for nothing


def causal_convolution(
    u: Tensor,  # (batch, channel, length)
    taps: Tensor,  # (channel, length or more)
) -> Tensor:  # (batch, channel, length)
    """y_t = Σ_{s≤t} h_{t-s} u_s, by FFT in float32 or wider.

    The FFT is at least as long as input and taps together, so nothing wraps around.
    """
    if u.numel() == 0:
        return u
    return CausalConvolution.apply(u, taps[..., : u.shape[-1]])


class CausalConvolution(torch.autograd.Function):
    """`causal_convolution` that keeps u and the taps for its gradient, not their spectra of twice the length.

    With the spectra U, H and D of u, taps and dy, those of du and of the taps' gradient are D H* and Σ D U*, summed
    over what shares the taps.
    """

    @staticmethod
    def forward(ctx, u, taps):
        ctx.save_for_backward(u, taps)
        (signal, filter), size = _spectra(u, taps)
        return torch.fft.irfft(signal.mul_(filter), n=size)[..., : u.shape[-1]].to(u.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        u, taps = ctx.saved_tensors
        (signal, filter, slope), size = _spectra(u, taps, dy)
        dtaps = (slope * signal.conj()).sum_to_size(filter.shape)
        du = slope.mul_(filter.conj())
        du, dtaps = (torch.fft.irfft(z, n=size)[..., : like.shape[-1]] for z, like in ((du, u), (dtaps, taps)))
        return du.to(u.dtype), dtaps.to(taps.dtype)


def _spectra(u, taps, *others):
    """In float32 or wider, of a size in which nothing wraps around; and that size."""
    size = u.shape[-1] + taps.shape[-1]
    if not torch.compiler.is_compiling():  # a graph with symbolic length has no bit_length()
        size = transform_size(size)
    wide = torch.promote_types(u.dtype, torch.float32)
    return [torch.fft.rfft(z.to(wide), n=size) for z in (u, taps, *others)], size


def transform_size(length: int) -> int:
    """The next size of the form (8 … 15) 2^n, at most 1/8 more: an FFT of prime length takes several times as long."""
    step = 1 << max(0, length.bit_length() - 4)
    return -(-length // step) * step


def outer_product_convolution(
    q: Tensor,  # (batch, filter, query, length, width)
    k: Tensor,  # (batch, filter, length, width)
    v: Tensor,  # (batch, filter, length, value width)
    taps: Tensor,  # (filter, length or more)
) -> Tensor:  # (batch, filter, query, length, value width)
    """y_t = Σ_i q_ti (h * (k_i v))_t: the FFT form, O(width · value width · length log length) for each filter.

    Only one row i of the outer product is in memory at a time; the backward pass recomputes it.
    """
    y = v.new_zeros(*q.shape[:-1], v.shape[-1], dtype=torch.promote_types(q.dtype, torch.float32))
    for row in range(q.shape[-1]):
        y = y + checkpoint(_row, q[..., row], k[..., row], v, taps, use_reentrant=False)
    return y.to(v.dtype)


def _row(q, k, v, taps):
    convolved = causal_convolution(k[..., None, :] * v.transpose(-1, -2), taps[:, None])
    return q[..., None] * convolved.transpose(-1, -2)[:, :, None]


class ToeplitzProduct(torch.autograd.Function):
    """y = ((q kᵀ) ⊙ T) v with T_ts = h_{t-s}: the matrix form, BLOCK rows at a time.

    q is (batch, filter, query, length, width), k and v the same without the queries that share them, v perhaps of
    another width, taps (filter, length or more). The backward pass recomputes each block's scores, so no length² matrix
    is ever stored. On a CPU it is made in machine code where that can be had.
    """

    @staticmethod
    def forward(ctx, q, k, v, taps):
        ctx.save_for_backward(q, k, v, taps)
        if pays(q, k, v, taps):
            return product(q, k, v, taps)
        y = v.new_empty(*q.shape[:-1], v.shape[-1])
        for rows in _blocks(q):
            seen = slice(rows.stop)
            scores = score(q[:, :, :, rows], k[:, :, seen])
            y[:, :, :, rows] = weighted(scores.mul_(toeplitz_block(taps, rows)[:, None]), v[:, :, seen])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        q, k, v, taps = ctx.saved_tensors
        if pays(q, k, v, taps):
            return gradients(dy, q, k, v, taps)
        wide = torch.promote_types(q.dtype, torch.float32)  # many blocks are summed
        dq, dtaps = torch.empty_like(q), torch.zeros_like(taps, dtype=wide)
        dk, dv = torch.zeros_like(k, dtype=wide), torch.zeros_like(v, dtype=wide)
        for rows in _blocks(q):
            seen = slice(rows.stop)
            block = toeplitz_block(taps, rows)[:, None]
            scores = score(q[:, :, :, rows], k[:, :, seen])
            weights = score(dy[:, :, :, rows], v[:, :, seen])
            dtaps[:, seen] += along_lags((scores * weights).sum((0, 2), dtype=wide))
            dv[:, :, seen] += scores.mul_(block).flatten(2, 3).mT @ dy[:, :, :, rows].flatten(2, 3)
            dq[:, :, :, rows] = weighted(weights.mul_(block), k[:, :, seen])
            dk[:, :, seen] += weights.flatten(2, 3).mT @ q[:, :, :, rows].flatten(2, 3)
        return dq, dk.to(k.dtype), dv.to(v.dtype), dtaps.to(taps.dtype)


def score(
    q: Tensor,  # (batch, filter, query, row, width)
    k: Tensor,  # (batch, filter, column, width)
) -> Tensor:  # (batch, filter, query, row, column)
    """q kᵀ, as one matrix product for all queries that share k."""
    return (q.flatten(2, 3) @ k.mT).unflatten(2, q.shape[2:4])


def weighted(
    weights: Tensor,  # (batch, filter, query, row, column)
    v: Tensor,  # (batch, filter, column, width)
) -> Tensor:  # (batch, filter, query, row, width)
    """The sums of v by these weights, as one matrix product for all queries that share v."""
    return (weights.flatten(2, 3) @ v).unflatten(2, weights.shape[2:4])


def short_convolution(
    x: Tensor,  # (batch, length, channel)
    weight: Tensor,  # (channel, tap): weight[:, -1] multiplies the current token
    conv_state: Tensor | None = None,  # (batch, tap - 1, channel): the tokens before x; None: zeros
) -> tuple[Tensor, Tensor]:  # (batch, length, channel), the state after x
    """y_t = Σ_j w_j x_{t-K+1+j} in each channel, for any length of x, including 1 and 0."""
    kept = weight.shape[1] - 1
    if conv_state is None:
        conv_state = x.new_zeros(x.shape[0], kept, x.shape[2])
    extended = torch.cat([conv_state.to(x.dtype), x], dim=1) if kept else x
    length = x.shape[1]
    if length == 0:
        return x, extended
    state = extended[:, length:].clone()  # a view would keep the whole prompt in memory
    if length == 1:  # a decoding step, where calling a Function costs more than the arithmetic
        return (extended.transpose(1, 2) * weight).sum(-1)[:, None], state
    return ShortConvolution.apply(extended, weight)[:, kept:], state


class ShortConvolution(torch.autograd.Function):
    """y_t = Σ_j w_j x_{t-K+1+j} in each channel, after zeros, as a multiply-add for each tap without a transpose.

    x and y are (batch, length, channel), w (channel, tap). On a CPU with three taps it takes 0.4 to 0.7 of the time of
    conv1d, in float32 and bfloat16, and a seventh or less with one.
    """

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        y = x * weight[:, -1]
        for tap, early, late in _shifts(x, weight):
            y[:, late].addcmul_(x[:, early], weight[:, tap])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        dx, dweight = dy * weight[:, -1], torch.zeros_like(weight)
        dweight[:, -1] = (x * dy).sum((0, 1))
        for tap, early, late in _shifts(x, weight):
            dx[:, early].addcmul_(dy[:, late], weight[:, tap])
            dweight[:, tap] = (x[:, early] * dy[:, late]).sum((0, 1))
        return dx, dweight


def _shifts(x, weight):
    """Each tap of an earlier token, the tokens that it reads, and those that it is added to."""
    length, last = x.shape[1], weight.shape[1] - 1
    behind = [(tap, last - tap) for tap in range(last) if last - tap < length]
    return [(tap, slice(length - by), slice(by, None)) for tap, by in behind]


def toeplitz_block(
    taps: Tensor,  # (filter, rows.stop or more)
    rows: slice,  # output positions
) -> Tensor:  # (filter, row, rows.stop)
    """T_ts = h_{t-s} for t in `rows` and s < rows.stop, zero where s > t."""
    count = rows.stop - rows.start
    ends = F.pad(taps[:, : rows.stop].flip(-1), (0, count - 1))
    return ends.unfold(-1, rows.stop, 1).flip(1)  # the windows of the reversed taps, the longest lag first


def along_lags(block):
    """The sum of a (filter, row, column) block along each lag, (filter, column): the adjoint of toeplitz_block."""
    filters, count, columns = block.shape
    # Padding rows by `count` and reshaping to rows one shorter shifts each row one column further: lags become columns.
    skewed = F.pad(block.flip(1), (0, count)).flatten(1)[:, : count * (columns + count - 1)]
    return skewed.unflatten(1, (count, -1)).sum(1)[:, :columns].flip(-1)


def _blocks(q):
    length = q.shape[3]
    rows = max(BLOCK, GPU_SCORES // q[..., 0].numel()) if q.is_cuda else BLOCK
    return [slice(start, min(start + rows, length)) for start in range(0, length, rows)]
