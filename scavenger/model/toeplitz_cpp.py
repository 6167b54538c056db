"""The Toeplitz product in machine code, on a CPU: a tile of scores never leaves the cache of a core.

In torch each score passes through memory a dozen times, and matrix products as narrow as a filter leave most of a core
idle. The results are those of torch to rounding.
"""

import ctypes

import torch
from torch import Tensor

from .machine_code import library


WIDEST = 64  # channels of a filter: measured to be faster than torch up to this width

SOURCE = r"""
#include <algorithm>
#include <cstdint>
#include <vector>

struct Tensor4 { void *data; int64_t batch, filter, query, token; };  // strides; channels are adjacent

struct Arguments {
    int64_t batch, filters, queries, length, width, value_width, taps_stride, threads;
    Tensor4 q, k, v, y, dq, dk, dv;  // backward: y is the gradient of y
    const void *taps;                // (filter, length or more)
    void *dtaps;                     // (batch, filter, length)
};

constexpr int64_t TILE = 32;  // rows and columns of scores that are held at a time

// Numbers of one operation, read and written at any address.
typedef float Floats __attribute__((vector_size(32), aligned(4), may_alias));
typedef double Doubles __attribute__((vector_size(32), aligned(8), may_alias));
template <typename T> struct Vector;
template <> struct Vector<float> { typedef Floats type; static constexpr int64_t size = 8; };
template <> struct Vector<double> { typedef Doubles type; static constexpr int64_t size = 4; };
template <typename T> using V = typename Vector<T>::type;

static int64_t up(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// out (TILE, TILE) = rows (TILE, stride) times columns (n, columns_stride).
template <typename T>
static void scores(const T *rows, int64_t stride, const T *columns, int64_t columns_stride, int64_t n, T *out) {
    constexpr int64_t size = Vector<T>::size;
    for (int64_t t = 0; t < TILE; t += 4)
        for (int64_t s = 0; s < TILE; s += 2 * size) {
            V<T> sum[4][2] = {};
            for (int64_t i = 0; i < n; i++) {
                const V<T> *c = (const V<T> *)(columns + i * columns_stride + s);
                const V<T> first = c[0], second = c[1];
                for (int64_t u = 0; u < 4; u++) {
                    const T x = rows[(t + u) * stride + i];
                    sum[u][0] += x * first;
                    sum[u][1] += x * second;
                }
            }
            for (int64_t u = 0; u < 4; u++) {
                V<T> *o = (V<T> *)(out + (t + u) * TILE + s);
                o[0] = sum[u][0];
                o[1] = sum[u][1];
            }
        }
}

// out (TILE, width) += weights times x (TILE, width); weights (TILE, TILE), or transposed.
template <typename T, bool transposed> static void add_product(T *out, const T *weights, const T *x, int64_t width) {
    constexpr int64_t size = Vector<T>::size, row = transposed ? 1 : TILE, column = transposed ? TILE : 1;
    for (int64_t j = 0; j < width; j += size)
        for (int64_t t = 0; t < TILE; t += 8) {
            V<T> sum[8];
            for (int64_t u = 0; u < 8; u++) sum[u] = *(V<T> *)(out + (t + u) * width + j);
            for (int64_t s = 0; s < TILE; s++) {
                const V<T> value = *(const V<T> *)(x + s * width + j);
                for (int64_t u = 0; u < 8; u++) sum[u] += weights[(t + u) * row + s * column] * value;
            }
            for (int64_t u = 0; u < 8; u++) *(V<T> *)(out + (t + u) * width + j) = sum[u];
        }
}

template <typename T> static T *at(const Tensor4 &x, int64_t b, int64_t f, int64_t r, int64_t t) {
    return (T *)x.data + b * x.batch + f * x.filter + r * x.query + t * x.token;
}

// `count` tokens from the `first` on of a tensor whose end is `length`, zero beyond it.
template <typename T>
static void read(const Tensor4 &x, int64_t b, int64_t f, int64_t r, int64_t first, int64_t count, int64_t length,
                 int64_t n, int64_t width, T *to) {
    std::fill_n(to, count * width, T(0));
    for (int64_t t = first; t < std::min(first + count, length); t++)
        std::copy_n(at<T>(x, b, f, r, t), n, to + (t - first) * width);
}

template <typename T>
static void write(const Tensor4 &x, int64_t b, int64_t f, int64_t r, int64_t first, int64_t count, int64_t length,
                  int64_t n, int64_t width, const T *from) {
    for (int64_t t = first; t < std::min(first + count, length); t++)
        std::copy_n(from + (t - first) * width, n, at<T>(x, b, f, r, t));
}

template <typename T> static void transpose(const T *x, int64_t tokens, int64_t width, int64_t n, T *to) {
    for (int64_t i = 0; i < n; i++)
        for (int64_t t = 0; t < tokens; t++) to[i * tokens + t] = x[t * width + i];
}

// The taps from the last lag to the first, with zeros on both sides: the lags t - s of a tile's row are adjacent.
template <typename T> struct Lags {
    std::vector<T> of;
    int64_t length;
    explicit Lags(int64_t length) : of(length + 3 * TILE), length(length) {}
    T *row(int64_t t, int64_t s) { return of.data() + TILE + length - 1 - t + s; }
    void set(const T *taps) {
        for (int64_t n = 0; n < length; n++) *row(n, 0) = taps[n];
    }
};

template <typename T> static void forward(const Arguments &a, int64_t b, int64_t f) {
    const int64_t tokens = up(a.length, TILE), width = up(a.width, Vector<T>::size);
    const int64_t value_width = up(a.value_width, Vector<T>::size);
    std::vector<T> k(tokens * width), columns(tokens * a.width), v(tokens * value_width), q(TILE * width);
    std::vector<T> y(TILE * value_width), weights(TILE * TILE);
    Lags<T> lags(a.length);
    lags.set((const T *)a.taps + f * a.taps_stride);
    read(a.k, b, f, 0, 0, tokens, a.length, a.width, width, k.data());
    transpose(k.data(), tokens, width, a.width, columns.data());
    read(a.v, b, f, 0, 0, tokens, a.length, a.value_width, value_width, v.data());
    for (int64_t r = 0; r < a.queries; r++)
        for (int64_t t = 0; t < tokens; t += TILE) {
            read(a.q, b, f, r, t, TILE, a.length, a.width, width, q.data());
            std::fill(y.begin(), y.end(), T(0));
            for (int64_t s = 0; s <= t; s += TILE) {
                scores(q.data(), width, columns.data() + s, tokens, a.width, weights.data());
                for (int64_t u = 0; u < TILE; u++) {
                    const T *h = lags.row(t + u, s);
                    for (int64_t w = 0; w < TILE; w++) weights[u * TILE + w] *= h[w];
                }
                add_product<T, false>(y.data(), weights.data(), v.data() + s * value_width, value_width);
            }
            write(a.y, b, f, r, t, TILE, a.length, a.value_width, value_width, y.data());
        }
}

template <typename T> static void backward(const Arguments &a, int64_t b, int64_t f) {
    const int64_t tokens = up(a.length, TILE), width = up(a.width, Vector<T>::size);
    const int64_t value_width = up(a.value_width, Vector<T>::size);
    std::vector<T> k(tokens * width), columns(tokens * a.width), q(TILE * width), dq(TILE * width);
    std::vector<T> v(tokens * value_width), value_columns(tokens * a.value_width), dy(TILE * value_width);
    std::vector<T> dk(tokens * width), dv(tokens * value_width), weights(TILE * TILE), slopes(TILE * TILE);
    Lags<T> lags(a.length), dlags(a.length);
    lags.set((const T *)a.taps + f * a.taps_stride);
    read(a.k, b, f, 0, 0, tokens, a.length, a.width, width, k.data());
    transpose(k.data(), tokens, width, a.width, columns.data());
    read(a.v, b, f, 0, 0, tokens, a.length, a.value_width, value_width, v.data());
    transpose(v.data(), tokens, value_width, a.value_width, value_columns.data());
    for (int64_t r = 0; r < a.queries; r++)
        for (int64_t t = 0; t < tokens; t += TILE) {
            read(a.q, b, f, r, t, TILE, a.length, a.width, width, q.data());
            read(a.y, b, f, r, t, TILE, a.length, a.value_width, value_width, dy.data());
            std::fill(dq.begin(), dq.end(), T(0));
            for (int64_t s = 0; s <= t; s += TILE) {
                scores(q.data(), width, columns.data() + s, tokens, a.width, weights.data());
                scores(dy.data(), value_width, value_columns.data() + s, tokens, a.value_width, slopes.data());
                for (int64_t u = 0; u < TILE; u++) {
                    const T *h = lags.row(t + u, s);
                    T *dh = dlags.row(t + u, s), *weight = &weights[u * TILE], *slope = &slopes[u * TILE];
                    for (int64_t w = 0; w < TILE; w++) {
                        dh[w] += weight[w] * slope[w];
                        weight[w] *= h[w];
                        slope[w] *= h[w];
                    }
                }
                add_product<T, true>(dv.data() + s * value_width, weights.data(), dy.data(), value_width);
                add_product<T, false>(dq.data(), slopes.data(), k.data() + s * width, width);
                add_product<T, true>(dk.data() + s * width, slopes.data(), q.data(), width);
            }
            write(a.dq, b, f, r, t, TILE, a.length, a.width, width, dq.data());
        }
    write(a.dk, b, f, 0, 0, tokens, a.length, a.width, width, dk.data());
    write(a.dv, b, f, 0, 0, tokens, a.length, a.value_width, value_width, dv.data());
    T *dtaps = (T *)a.dtaps + (b * a.filters + f) * a.length;
    for (int64_t n = 0; n < a.length; n++) dtaps[n] = *dlags.row(n, 0);
}

template <typename T> static void all(const Arguments &a, void (*one)(const Arguments &, int64_t, int64_t)) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t task = 0; task < a.batch * a.filters; task++) one(a, task / a.filters, task % a.filters);
}

extern "C" void forward_float32(const Arguments *a) { all<float>(*a, forward<float>); }
extern "C" void forward_float64(const Arguments *a) { all<double>(*a, forward<double>); }
extern "C" void backward_float32(const Arguments *a) { all<float>(*a, backward<float>); }
extern "C" void backward_float64(const Arguments *a) { all<double>(*a, backward<double>); }
"""


class _Tensor4(ctypes.Structure):
    """As in the source."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        *[(name, ctypes.c_int64) for name in ("batch", "filter", "query", "token")],
    ]

    @classmethod
    def of(cls, x: Tensor):
        """Of a tensor (batch, filter, token, channel), or with queries before the tokens."""
        strides = x.stride() if x.ndim == 5 else (*x.stride()[:2], 0, *x.stride()[2:])
        return cls(x.data_ptr(), *strides[:4])


class _Arguments(ctypes.Structure):
    """As in the source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in ("batch", "filters", "queries", "length", "width", "value_width", "taps_stride", "threads")
        ],
        *[(name, _Tensor4) for name in ("q", "k", "v", "y", "dq", "dk", "dv")],
        ("taps", ctypes.c_void_p),
        ("dtaps", ctypes.c_void_p),
    ]


def compiled() -> ctypes.CDLL | None:
    """The source as a library; None where it cannot be compiled."""
    return library("toeplitz", SOURCE)


def takes(v: Tensor, width: int) -> bool:
    """Whether the product may be made here for these values and keys of this width: on a CPU, of a narrow filter."""
    known = v.device.type == "cpu" and v.dtype in (torch.float32, torch.float64) and max(width, v.shape[-1]) <= WIDEST
    return known and not torch.compiler.is_compiling() and compiled() is not None


def pays(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> bool:
    """Whether it is to be made here: all of it is of one type."""
    return type(q) is Tensor and q.dtype == k.dtype == v.dtype == taps.dtype and takes(v, q.shape[-1])


def product(q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> Tensor:
    """y_t = Σ_{s≤t} h_{t-s} (q_t · k_s) v_s, shapes as in ToeplitzProduct."""
    q, k, v, taps = (_adjacent(x) for x in (q, k, v, taps))
    y = _by_token(v, (*q.shape[:-1], v.shape[-1]))
    _call("forward", q, k, v, taps, y=y)
    return y


def gradients(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, taps: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of q, k, v and taps."""
    dy, q, k, v, taps = (_adjacent(x) for x in (dy, q, k, v, taps))
    dq, dk, dv = (_by_token(x, x.shape) for x in (q, k, v))
    parts = taps.new_empty(len(k), *k.shape[1:3])
    _call("backward", q, k, v, taps, y=dy, dq=dq, dk=dk, dv=dv, dtaps=parts)
    dtaps = torch.zeros_like(taps)
    torch.sum(parts, 0, out=dtaps[:, : parts.shape[2]])
    return dq, dk, dv, dtaps


def _by_token(like, shape):
    """A new tensor (batch, filter, …, token, channel), the channels of all filters of a token adjacent in memory."""
    batch, *between, token, channel = shape
    made = like.new_empty(batch, token, *between, channel)
    return made.movedim(1, -2)


def _adjacent(x):
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def _call(what, q, k, v, taps, dtaps=None, **tensors):
    batch, filters, queries, length, width = q.shape
    arguments = _Arguments(
        batch=batch,
        filters=filters,
        queries=queries,
        length=length,
        width=width,
        value_width=v.shape[-1],
        taps_stride=taps.stride(0),
        threads=torch.get_num_threads(),
        **{name: _Tensor4.of(x) for name, x in {"q": q, "k": k, "v": v, **tensors}.items()},
        taps=taps.data_ptr(),
        dtaps=None if dtaps is None else dtaps.data_ptr(),
    )
    kind = str(q.dtype).removeprefix("torch.")
    getattr(compiled(), f"{what}_{kind}")(ctypes.byref(arguments))
