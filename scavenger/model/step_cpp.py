"""One token through a mixer in machine code, on a CPU: one pass over its state, where torch takes dozens of calls."""

import ctypes

import torch

from .machine_code import library


# Numbers of state that a second thread is worth: it takes some microseconds to start, in which one core reads so many.
PARALLEL = 1 << 15

SOURCE = r"""
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// The last `window` tokens of `heads` heads; token n is at place n mod window.
struct Ring { void *keys, *values; bool *real; int64_t *written; int64_t window; };

struct Arguments {
    int64_t rows, heads, queries, width, pairs, adjacent, taps, groups, own_state, components, gated, threads;
    double scale, eps;
    const void *projected, *taps_of, *cos, *sin, *q_norm, *k_norm, *gates;
    const bool *real;            // null: every row has a token
    void *conv_state, *y;
    const int64_t *kept;         // of each head: its place among the heads that keep attention, or -1 - its place
    int64_t kept_heads;          // among the others
    Ring near, kept_ring;        // window 0: none
    const void *poles, *residues, *direct;  // (component, mode), (component, mode), (filter)
    const int64_t *first, *size;            // of each filter: its first mode, how many
    int64_t modes, filters;
    void *state;                 // width 1: (row, component, mode), else (row, mode, component, width, width)
};

template <typename T> static T dot(const T *a, const T *b, int64_t n) {
    T sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// Puts the token in the place of the oldest, which is returned in `left_k`, `left_v`, and adds up the values that each
// query sees.
template <typename T>
static void attend(const Ring &ring, int64_t row, int64_t head, int64_t heads, int64_t queries, int64_t n,
                   int64_t place, const T *q, const T *k, const T *v, T *y, T *left_k, T *left_v, T *scores) {
    const int64_t w = ring.window;
    T *keys = (T *)ring.keys + (row * heads + head) * w * n, *values = (T *)ring.values + (row * heads + head) * w * n;
    const bool *is_real = ring.real + row * w;
    std::copy_n(keys + place * n, n, left_k);
    std::copy_n(values + place * n, n, left_v);
    std::copy_n(k, n, keys + place * n);
    std::copy_n(v, n, values + place * n);
    const T scale = T(1) / std::sqrt(T(n)), none = -std::numeric_limits<T>::infinity();
    for (int64_t r = 0; r < queries; r++) {
        T top = none, total = 0;
        for (int64_t i = 0; i < w; i++) {
            scores[i] = i == place || is_real[i] ? scale * dot(q + r * n, keys + i * n, n) : none;
            top = std::max(top, scores[i]);
        }
        T *sum = y + r * n;
        std::fill_n(sum, n, T(0));
        for (int64_t i = 0; i < w; i++) {
            if (scores[i] == none) continue;
            const T weight = std::exp(scores[i] - top);
            total += weight;
#pragma omp simd
            for (int64_t j = 0; j < n; j++) sum[j] += weight * values[i * n + j];
        }
#pragma omp simd
        for (int64_t j = 0; j < n; j++) sum[j] /= total;
    }
}

// X <- lambda X + k v^T of each mode of a filter, and y = Re sum R q^T X + D (q . k) v for each query.
template <typename T>
static void filter(const Arguments &a, int64_t row, int64_t f, int64_t queries, int64_t stride, int64_t n, const T *q,
                   const T *k, const T *v, T *y) {
    const T *poles = (const T *)a.poles, *residues = (const T *)a.residues, direct = ((const T *)a.direct)[f];
    const bool pairs = a.components == 2;
    for (int64_t r = 0; r < queries; r++) {
        const T d = direct * dot(q + r * stride, k, n);
        for (int64_t j = 0; j < n; j++) y[r * stride + j] = d * v[j];
    }
    const int64_t begin = a.first[f], end = begin + a.size[f];
    if (n == 1) {  // the modes of a channel are one after the other
        T *re = (T *)a.state + row * a.components * a.modes, *im = re + a.modes;
        const T added = k[0] * v[0];
        T sum = 0;
        if (pairs) {
#pragma omp simd reduction(+ : sum)
            for (int64_t m = begin; m < end; m++) {
                const T x = poles[m] * re[m] - poles[a.modes + m] * im[m] + added;
                im[m] = poles[m] * im[m] + poles[a.modes + m] * re[m];
                re[m] = x;
                sum += residues[m] * x - residues[a.modes + m] * im[m];
            }
        } else {
#pragma omp simd reduction(+ : sum)
            for (int64_t m = begin; m < end; m++) {
                re[m] = poles[m] * re[m] + added;
                sum += residues[m] * re[m];
            }
        }
        for (int64_t r = 0; r < queries; r++) y[r * stride] += q[r * stride] * sum;
        return;
    }
    for (int64_t m = begin; m < end; m++) {
        T *re = (T *)a.state + (row * a.modes + m) * a.components * n * n, *im = re + n * n;
        const T p = poles[m], s = residues[m];
        const T p_im = pairs ? poles[a.modes + m] : T(0), s_im = pairs ? residues[a.modes + m] : T(0);
        for (int64_t i = 0; i < n; i++, re += n, im += n) {
            if (pairs) {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) {
                    const T x = p * re[j] - p_im * im[j] + k[i] * v[j];
                    im[j] = p * im[j] + p_im * re[j];
                    re[j] = x;
                }
                for (int64_t r = 0; r < queries; r++) {
                    const T c = q[r * stride + i] * s, c_im = q[r * stride + i] * s_im;
#pragma omp simd
                    for (int64_t j = 0; j < n; j++) y[r * stride + j] += c * re[j] - c_im * im[j];
                }
            } else {
#pragma omp simd
                for (int64_t j = 0; j < n; j++) re[j] = p * re[j] + k[i] * v[j];
                for (int64_t r = 0; r < queries; r++) {
                    const T c = q[r * stride + i] * s;
#pragma omp simd
                    for (int64_t j = 0; j < n; j++) y[r * stride + j] += c * re[j];
                }
            }
        }
    }
}

// The short convolution of `count` channels from `channel` on, whose state moves on by this token.
template <typename T>
static void convolve(const Arguments &a, int64_t row, int64_t channel, int64_t count, T *x) {
    const int64_t streams = (a.heads * a.queries + 2 * a.heads) * a.width, kept = a.taps - 1;
    const T *now = (const T *)a.projected + row * streams + channel;
    if (!a.taps) {  // a layer that keeps attention has none
        std::copy_n(now, count, x);
        return;
    }
    const T *weight = (const T *)a.taps_of + channel * a.taps;
    T *before = (T *)a.conv_state + row * kept * streams + channel;
    for (int64_t c = 0; c < count; c++) {
        const T token = now[c];
        T sum = weight[c * a.taps + kept] * token;
        for (int64_t t = 0; t < kept; t++) {
            sum += weight[c * a.taps + t] * before[t * streams + c];
            before[t * streams + c] = t + 1 < kept ? before[(t + 1) * streams + c] : token;
        }
        x[c] = sum;
    }
}

// The norm of one head of q or k, where there is one, and its rotary turn.
template <typename T>
static void normalise_and_turn(const Arguments &a, int64_t row, const T *weight, T *x) {
    const int64_t n = a.width;
    if (weight) {
        const T factor = T(1) / std::sqrt(dot(x, x, n) / T(n) + T(a.eps));
        for (int64_t i = 0; i < n; i++) x[i] = weight[i] * (x[i] * factor);
    }
    const T *cos = (const T *)a.cos + row * a.pairs, *sin = (const T *)a.sin + row * a.pairs;
    for (int64_t i = 0; i < a.pairs; i++) {
        T &first = x[a.adjacent ? 2 * i : i], &second = x[a.adjacent ? 2 * i + 1 : i + a.pairs];
        const T turned = first * cos[i] - second * sin[i];
        second = second * cos[i] + first * sin[i];
        first = turned;
    }
}

template <typename T> static T opened(const void *gates, int64_t index) {
    return T(2) / (T(1) + std::exp(-((const T *)gates)[index]));
}

// One head of k and v of one row, with its heads of q.
template <typename T>
static void head(const Arguments &a, int64_t row, int64_t h, int64_t near_place, int64_t kept_place, T *scratch) {
    const int64_t n = a.width, count = a.queries * n, inner = a.heads * count;
    T *q = scratch, *near = q + count, *k = near + count, *v = k + n, *left_k = v + n, *left_v = left_k + n;
    T *scores = left_v + n, *y = (T *)a.y + row * inner + h * count;
    convolve(a, row, h * count, count, q);
    convolve(a, row, inner + h * n, n, k);
    convolve(a, row, inner + (a.heads + h) * n, n, v);
    for (int64_t r = 0; r < a.queries; r++) normalise_and_turn(a, row, (const T *)a.q_norm, q + r * n);
    normalise_and_turn(a, row, (const T *)a.k_norm, k);
    const int64_t others = a.heads - a.kept_heads;
    if (a.kept[h] >= 0) {
        attend(a.kept_ring, row, a.kept[h], a.kept_heads, a.queries, n, kept_place, q, k, v, y, left_k, left_v, scores);
        return;
    }
    const int64_t own = -1 - a.kept[h];
    const T *far_k = k, *far_v = v;
    if (a.near.window) {
        attend(a.near, row, own, others, a.queries, n, near_place, q, k, v, near, left_k, left_v, scores);
        far_k = left_k, far_v = left_v;
    }
    if (a.filters) {
        for (int64_t i = 0; i < count; i++) q[i] *= T(a.scale);
        const int64_t part = n / a.groups;
        for (int64_t g = 0; g < a.groups; g++) {
            const int64_t at = g * part;
            if (a.own_state) {
                for (int64_t r = 0; r < a.queries; r++)
                    filter(a, row, (own * a.queries + r) * a.groups + g, 1, n, part, q + r * n + at, far_k + at,
                           far_v + at, y + r * n + at);
            } else {
                filter(a, row, own * a.groups + g, a.queries, n, part, q + at, far_k + at, far_v + at, y + at);
            }
        }
    }
    if (!a.near.window) return;
    const int64_t joined = others * a.queries;
    for (int64_t r = 0; r < a.queries; r++) {
        const int64_t gate = row * 2 * joined + own * a.queries + r;
        const T open = a.gated ? opened<T>(a.gates, gate) : T(1);
        const T ajar = a.gated ? opened<T>(a.gates, gate + joined) : T(0);
        for (int64_t j = r * n; j < (r + 1) * n; j++) y[j] = open * near[j] + (a.gated ? ajar * y[j] : T(0));
    }
}

// All heads of all rows, by the threads that call it together.
template <typename T> static void mix(const Arguments &a, std::vector<T> &scratch) {
    const int64_t near = a.near.window ? *a.near.written % a.near.window : 0;
    const int64_t kept = a.kept_ring.window ? *a.kept_ring.written % a.kept_ring.window : 0;
    scratch.resize((2 * a.queries + 4) * a.width + std::max(a.near.window, a.kept_ring.window));
#pragma omp for schedule(static)
    for (int64_t task = 0; task < a.rows * a.heads; task++)
        head<T>(a, task / a.heads, task % a.heads, near, kept, scratch.data());
#pragma omp single
    {
        for (int64_t row = 0; row < a.rows; row++) {
            const bool real = !a.real || a.real[row];
            if (a.near.window) a.near.real[row * a.near.window + near] = real;
            if (a.kept_ring.window) a.kept_ring.real[row * a.kept_ring.window + kept] = real;
        }
        if (a.near.window) ++*a.near.written;
        if (a.kept_ring.window) ++*a.kept_ring.written;
    }
}

template <typename T> static void step(const Arguments &a) {
#pragma omp parallel num_threads(a.threads) if (a.threads > 1)
    {
        std::vector<T> scratch;
        mix<T>(a, scratch);
    }
}

extern "C" void step_float32(const Arguments *a) { step<float>(*a); }
extern "C" void step_float64(const Arguments *a) { step<double>(*a); }

// A whole student.

struct Norm { const void *weight, *bias; double eps; int64_t rms; };
struct Linear { const void *weight, *bias; int64_t in, out; };  // weight (out, in)
struct Block {
    Norm mixer_norm, mlp_norm;
    Linear q, k, v, join, out, up, gate, down;  // join, gate: out 0 where there is none
    int64_t activation, parallel;
    Arguments mixer;  // reads what streams and join found
};
struct Student {
    int64_t rows, layers, width, words, threads;
    const int64_t *ids;
    int64_t *seen, *real;  // tokens read: one number; and of each row
    const void *embedding;
    double embedding_scale;
    const Block *blocks;
    Norm norm;
    Linear head;
    void *hidden, *inner, *logits;
};

template <typename T> static void normalised(const Norm &norm, const T *x, int64_t rows, int64_t n, T *y) {
    const T *weight = (const T *)norm.weight, *bias = (const T *)norm.bias;
    for (int64_t r = 0; r < rows; r++, x += n, y += n) {
        T mean = 0, squares = 0;
        if (!norm.rms) {
#pragma omp simd reduction(+ : mean)
            for (int64_t i = 0; i < n; i++) mean += x[i];
            mean /= T(n);
        }
#pragma omp simd reduction(+ : squares)
        for (int64_t i = 0; i < n; i++) squares += (x[i] - mean) * (x[i] - mean);
        const T factor = T(1) / std::sqrt(squares / T(n) + T(norm.eps));
        for (int64_t i = 0; i < n; i++) y[i] = (x[i] - mean) * factor * weight[i] + (bias ? bias[i] : T(0));
    }
}

// take(o, r, sum_i w_oi x_ri + bias_o) for this thread's outputs of a linear layer and all rows. Four outputs and two
// rows at a time: a number that is loaded serves several products, and sums do not wait for one another.
template <typename T, typename Take> static void products(const Linear &layer, const T *x, int64_t rows, Take take) {
    const T *weight = (const T *)layer.weight, *bias = (const T *)layer.bias;
    const int64_t n = layer.in;
#pragma omp for schedule(static) nowait
    for (int64_t group = 0; group < (layer.out + 3) / 4; group++) {
        const int64_t o = 4 * group, count = std::min<int64_t>(4, layer.out - o), last = count - 1;
        const T *a = weight + o * n, *b = a + std::min<int64_t>(1, last) * n, *c = a + std::min<int64_t>(2, last) * n;
        const T *d = a + last * n;
        int64_t r = 0;
        for (; r + 2 <= rows; r += 2) {
            const T *p = x + r * n, *q = p + n;
            T ap = 0, bp = 0, cp = 0, dp = 0, aq = 0, bq = 0, cq = 0, dq = 0;
#pragma omp simd reduction(+ : ap, bp, cp, dp, aq, bq, cq, dq)
            for (int64_t i = 0; i < n; i++) {
                ap += a[i] * p[i], bp += b[i] * p[i], cp += c[i] * p[i], dp += d[i] * p[i];
                aq += a[i] * q[i], bq += b[i] * q[i], cq += c[i] * q[i], dq += d[i] * q[i];
            }
            const T sums[2][4] = {{ap, bp, cp, dp}, {aq, bq, cq, dq}};
            for (int64_t j = 0; j < 2; j++)
                for (int64_t k = 0; k < count; k++) take(o + k, r + j, sums[j][k] + (bias ? bias[o + k] : T(0)));
        }
        if (r == rows) continue;
        const T *p = x + r * n;
        T ap = 0, bp = 0, cp = 0, dp = 0;
#pragma omp simd reduction(+ : ap, bp, cp, dp)
        for (int64_t i = 0; i < n; i++) ap += a[i] * p[i], bp += b[i] * p[i], cp += c[i] * p[i], dp += d[i] * p[i];
        const T sums[4] = {ap, bp, cp, dp};
        for (int64_t k = 0; k < count; k++) take(o + k, r, sums[k] + (bias ? bias[o + k] : T(0)));
    }
}

// Into rows of y that are `stride` apart.
template <typename T> static void linear(const Linear &layer, const T *x, int64_t rows, T *y, int64_t stride) {
    products(layer, x, rows, [=](int64_t o, int64_t r, T sum) { y[r * stride + o] = sum; });
}

// Added to rows of y.
template <typename T> static void added(const Linear &layer, const T *x, int64_t rows, T *y) {
    products(layer, x, rows, [=](int64_t o, int64_t r, T sum) { y[r * layer.out + o] += sum; });
}

template <typename T> static T activated(int64_t kind, T x) {
    switch (kind) {
        case 0: return x * T(0.5) * (T(1) + std::erf(x * T(0.70710678118654752440)));
        case 1: return x * T(0.5) * (T(1) + std::tanh(T(0.79788456080286535588) * (x + T(0.044715) * x * x * x)));
        case 2: return x / (T(1) + std::exp(-x));
        default: return x > 0 ? x : T(0);
    }
}

// A thread has the same outputs of both products.
template <typename T> static void widened(const Block &b, const T *x, int64_t rows, T *inner) {
    const int64_t n = b.up.out, kind = b.activation;
    if (!b.gate.out) {
        products(b.up, x, rows, [=](int64_t o, int64_t r, T sum) { inner[r * n + o] = activated(kind, sum); });
        return;
    }
    products(b.gate, x, rows, [=](int64_t o, int64_t r, T sum) { inner[r * n + o] = activated(kind, sum); });
    products(b.up, x, rows, [=](int64_t o, int64_t r, T sum) { inner[r * n + o] *= sum; });
}

// One token of every row. Threads compute norms each for itself, and share the outputs of products and the heads.
template <typename T> static int token(const Student &s) {
    for (int64_t r = 0; r < s.rows; r++)
        if (s.ids[r] < 0 || s.ids[r] >= s.words) return 1;
    T *hidden = (T *)s.hidden, *inner = (T *)s.inner;
#pragma omp parallel num_threads(s.threads) if (s.threads > 1)
    {
        std::vector<T> scratch, x(s.rows * s.width), other(s.rows * s.width);
#pragma omp for schedule(static)
        for (int64_t r = 0; r < s.rows; r++) {
            const T *word = (const T *)s.embedding + s.ids[r] * s.width;
            for (int64_t i = 0; i < s.width; i++) hidden[r * s.width + i] = word[i] * T(s.embedding_scale);
            ++s.real[r];
        }
        for (int64_t layer = 0; layer < s.layers; layer++) {
            const Block &b = s.blocks[layer];
            normalised(b.mixer_norm, hidden, s.rows, s.width, x.data());
            T *streams = (T *)b.mixer.projected;
            const int64_t stride = b.q.out + b.k.out + b.v.out;
            linear(b.q, x.data(), s.rows, streams, stride);
            linear(b.k, x.data(), s.rows, streams + b.q.out, stride);
            linear(b.v, x.data(), s.rows, streams + b.q.out + b.k.out, stride);
            linear(b.join, x.data(), s.rows, (T *)b.mixer.gates, b.join.out);
            if (b.parallel) {
                normalised(b.mlp_norm, hidden, s.rows, s.width, other.data());
                widened(b, other.data(), s.rows, inner);
            }
#pragma omp barrier
            mix<T>(b.mixer, scratch);
            added(b.out, (const T *)b.mixer.y, s.rows, hidden);
            if (!b.parallel) {
#pragma omp barrier
                normalised(b.mlp_norm, hidden, s.rows, s.width, x.data());
                widened(b, x.data(), s.rows, inner);
#pragma omp barrier
            }
            added(b.down, inner, s.rows, hidden);
#pragma omp barrier
        }
        normalised(s.norm, hidden, s.rows, s.width, x.data());
        linear(s.head, x.data(), s.rows, (T *)s.logits, s.head.out);
    }
    ++*s.seen;
    return 0;
}

extern "C" int token_float32(const Student *s) { return token<float>(*s); }
extern "C" int token_float64(const Student *s) { return token<double>(*s); }
"""


class Ring(ctypes.Structure):
    """As in the source."""

    _fields_ = [
        *[(name, ctypes.c_void_p) for name in ("keys", "values", "real", "written")],
        ("window", ctypes.c_int64),
    ]


class Arguments(ctypes.Structure):
    """As in the source."""

    _fields_ = [
        *[
            (name, ctypes.c_int64)
            for name in (
                *("rows", "heads", "queries", "width", "pairs", "adjacent"),
                *("taps", "groups", "own_state", "components", "gated", "threads"),
            )
        ],
        *[(name, ctypes.c_double) for name in ("scale", "eps")],
        *[
            (name, ctypes.c_void_p)
            for name in (
                *("projected", "taps_of", "cos", "sin", "q_norm", "k_norm", "gates"),
                *("real", "conv_state", "y", "kept"),
            )
        ],
        ("kept_heads", ctypes.c_int64),
        *[(name, Ring) for name in ("near", "kept_ring")],
        *[(name, ctypes.c_void_p) for name in ("poles", "residues", "direct", "first", "size")],
        *[(name, ctypes.c_int64) for name in ("modes", "filters")],
        ("state", ctypes.c_void_p),
    ]


def compiled() -> ctypes.CDLL | None:
    """The source as a library; None where it cannot be compiled."""
    return library("step", SOURCE)


def step_in_cpp(y, projected, *words):
    """`step` of step.py, into y."""
    arguments, read = step_arguments(y, projected, *words)
    entry = compiled().step_float32 if projected.dtype == torch.float32 else compiled().step_float64
    entry(ctypes.byref(arguments))


def step_arguments(
    y, projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state,
    width, queries, groups, own_state, pairs, adjacent, scale, eps,
):  # fmt: skip
    """The source's arguments, and what must live as long; `width` is that of a head, of `groups` with a filter each."""
    numbered = (ctypes.c_int64 * len(places))(*places)
    read = [None if x is None else x.contiguous() for x in (projected, taps, cos, sin, gates, real)]
    numbers = sum(x.numel() for x in [*near, *kept, *([] if state is None else [state])])
    arguments = Arguments(
        rows=len(projected),
        heads=len(places),
        queries=queries,
        width=width,
        pairs=pairs,
        adjacent=adjacent,
        taps=0 if taps is None else taps.shape[1],
        groups=groups,
        own_state=own_state,
        components=len(modes[0]) if modes else 0,
        gated=bool(near and modes),
        threads=torch.get_num_threads() if numbers > PARALLEL else 1,
        scale=scale,
        eps=eps,
        **dict(zip(("projected", "taps_of", "cos", "sin", "gates", "real"), map(address, read), strict=True)),
        **dict(zip(("q_norm", "k_norm"), map(address, norms or [None, None]), strict=True)),
        conv_state=address(conv_state),
        y=y.data_ptr(),
        kept=ctypes.addressof(numbered),
        kept_heads=kept[0].shape[1] if kept else 0,
        near=_ring(near),
        kept_ring=_ring(kept),
        **dict(zip(("poles", "residues", "direct", "first", "size"), map(address, modes), strict=False)),
        modes=modes[0].shape[1] if modes else 0,
        filters=len(modes[2]) if modes else 0,
        state=address(state),
    )
    return arguments, (numbered, read)


def _ring(tensors):
    return Ring(*map(address, tensors), tensors[0].shape[2]) if tensors else Ring()


def address(x):
    return None if x is None else x.data_ptr()
