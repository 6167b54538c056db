"""The Hankel matrix of a filter: its singular values, which decide the state size, and the error floors they prove.

The taps after the first, g_t = h_{t+1}, are the impulse response of a state-space model if and only if the Hankel
matrix H_ij = g_{i+j} has finite rank; with d real states its rank is at most d. The first tap needs no state: it is the
direct term. Everything is batched over filters and works on slices of PIECE_BYTES.
"""

import functools
from collections.abc import Iterator

import torch
from torch import Tensor


PIECE_BYTES = 1 << 24  # of temporaries at once, at least one filter; 4, 32 and 128 MiB were slower (measured on a CPU)
DENSE = 200  # taps; for longer filters a random subspace is faster than a full eigendecomposition (measured)
DENSE_SECTION = 400  # rows; the same for the singular values of a section (measured)
SPARE = 16  # oversampling of the random range finder, columns; our choice
COMPRESSED = 96  # columns kept of a long section; floors up to 48 states fell by < 0.5 % on smooth filters (measured)
LARGEST_WHOLE = 2048  # largest side of a section to decompose in full where its compression gives too low a floor
EPSILON = torch.finfo(torch.float64).eps


def relative_floors(g: Tensor) -> Tensor:
    """Lower bounds on the relative l2 error of any recurrence with d = 0, 1, … real states, (filter, states + 1).

    `g` is (filter, length). A recurrence of d states has a Hankel matrix of rank at most d, so by Eckart and Young
    (1936) its squared error on any section A, weighted or not, is at least Σ_{k>d} σ_k². With w_i² = C(2i, i)/4^i,
    Σ_i w_i² w_{t-i}² = 1, so ‖W H W‖_F² ≤ ‖g‖²; unweighted, each tap occurs at most `side` times. Both give a floor;
    the larger is returned. Compressing a long section with an orthonormal Q keeps the floor valid, since
    σ_k(Qᵀ A Q) ≤ σ_k(A). The possible rounding error is subtracted from each singular value.
    """
    side = (g.shape[1] + 1) // 2
    floors = g.new_zeros(len(g), side + 1)
    weights = _weights(g)
    for rows in pieces(len(g), 32 * side * (side if side <= DENSE_SECTION else 4 * COMPRESSED)):
        norm = g[rows].norm(dim=1)[:, None].clamp_min(1e-300)
        weighted = _tails(g[rows], weights) / norm
        plain = _tails(g[rows], torch.ones_like(weights)) / (norm * max(side, 1) ** 0.5)
        floors[rows] = torch.maximum(weighted, plain)
    # With no state the error is all of g, including the corner outside the section.
    floors[:, 0] = (g.norm(dim=1) > 0).to(g.dtype)
    return floors


def tap_floors(taps: Tensor) -> Tensor:
    """relative_floors relative to all taps; the first needs no state: (filter, length) to (filter, states + 1)."""
    share = taps[:, 1:].norm(dim=1) / taps.norm(dim=1).clamp_min(1e-300)
    return relative_floors(taps[:, 1:]) * share[:, None]


def section(g: Tensor) -> Tensor:
    """H_ij = g_{i+j}, the largest square block within the taps: (filter, length) to (filter, side, side)."""
    side = (g.shape[1] + 1) // 2
    return g.unfold(1, side, 1)[:, :side] if side else g.new_zeros(len(g), 0, 0)


def weighted_section(g: Tensor) -> Tensor:
    """W H W with w_i² = C(2i, i)/4^i: Σ_{k>d} σ_k² is at most the squared l2 error of any recurrence of d states."""
    weights = _weights(g)
    return weights[:, None] * section(g) * weights


def hankel_eigen(g: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The `count` eigenvalues of largest modulus of H, zero past the last tap, and their eigenvectors.

    (filter, length) to (filter, count) and (filter, length, count); padded with zeros if the matrix is smaller. The
    |eigenvalues| are the Hankel singular values. Dense for short filters, otherwise Rayleigh-Ritz on a random block
    Krylov space (Halko, Martinsson and Tropp 2011; Musco and Musco 2015), whose values never exceed the true ones.
    The caller must pass few enough filters to fit in memory.
    """
    length = g.shape[1]
    kept = min(count, length)
    if length <= max(DENSE, 3 * kept):
        values, vectors = torch.linalg.eigh(hankel_matrix(g))
    else:
        basis = _krylov(g, kept)
        compressed = hankel_product(g, basis.mT) @ basis
        values, vectors = torch.linalg.eigh((compressed + compressed.mT) / 2)
        vectors = basis @ vectors
    leading = values.abs().argsort(dim=1, descending=True)[:, :kept]
    values = values.gather(1, leading)
    vectors = vectors.gather(2, leading[:, None].expand(-1, length, -1))
    if kept < count:
        values = torch.nn.functional.pad(values, (0, count - kept))
        vectors = torch.nn.functional.pad(vectors, (0, count - kept))
    return values, vectors


def hankel_matrix(g: Tensor) -> Tensor:
    """H_ij = g_{i+j}, zero past the last tap: (filter, length) to (filter, length, length), symmetric."""
    if not g.shape[1]:
        return g.new_zeros(len(g), 0, 0)
    return torch.cat([g, torch.zeros_like(g)], dim=1).unfold(1, g.shape[1], 1)[:, : g.shape[1]]


def hankel_product(g: Tensor, x: Tensor) -> Tensor:
    """y_i = Σ_j g_{i+j} x_j, g zero past its end, by FFT: (filter, length) and (filter, row, side) to that of x.

    The rows may be one filter's, for all.
    """
    if not (len(g) and x.numel()):  # the FFT rejects empty tensors
        return x.new_zeros(len(g), *x.shape[1:])
    side = x.shape[-1]
    size = max(g.shape[1], 2 * side - 1)
    size = min(1 << (size - 1).bit_length(), 3 << max(0, (-(-size // 3) - 1).bit_length()))  # 2ⁿ or 3·2ⁿ: fast sizes
    transformed = torch.fft.rfft(x, n=size).conj() * torch.fft.rfft(g, n=size)[:, None]
    return torch.fft.irfft(transformed, n=size)[..., :side]


def gain_floors(values: Tensor) -> Tensor:
    """σ_{d+1}, a lower bound on the worst-case gain error of any stable recurrence with d = 0, 1, … real states.

    `values` is (filter, count), from hankel_eigen. Source: Adamyan, Arov and Krein (1971).
    """
    return values.abs()


def pieces(count: int, bytes_each: int) -> Iterator[slice]:
    """Slices of `count` filters, each of at most PIECE_BYTES or a single filter; one empty slice if `count` is 0."""
    step = max(1, PIECE_BYTES // max(bytes_each, 1))
    return (slice(start, min(start + step, count)) for start in range(0, max(count, 1), step))


def _krylov(g, kept):
    """An orthonormal basis of span{H Ω, H² Ω, H³ Ω}, (filter, length, column), which nearly contains H's leading part.

    A block that adds nothing new, as for an H of low rank, leaves arbitrary directions. That is harmless: the last QR
    makes the whole basis orthonormal whatever its rank.
    """
    width = kept // 2 + SPARE
    blocks, block = [], _start(width, g)[None]
    for _ in range(3):
        product = hankel_product(g, block)
        for earlier in blocks:
            product = product - (product @ earlier.mT) @ earlier
        block = torch.linalg.qr(product.mT)[0].mT
        blocks.append(block)
    return torch.linalg.qr(torch.cat(blocks, dim=1).mT)[0]


def _start(width, g):
    """Random rows as long as those of `g`; the same filters give the same recurrences."""
    return _drawn(width, g.shape[1], g.dtype).to(g.device)


@functools.lru_cache(maxsize=64)
def _drawn(*shape_and_dtype):
    *shape, dtype = shape_and_dtype
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


def _weights(g):
    """w_i with w_i² = C(2i, i)/4^i, (side,)."""
    side = (g.shape[1] + 1) // 2
    index = torch.arange(1, max(side, 1), device=g.device, dtype=g.dtype)
    return torch.cat([g.new_ones(min(side, 1)), ((2 * index - 1) / (2 * index)).cumprod(0)]).sqrt()


def _tails(g, weights):
    """√Σ_{k>d} σ_k² of the weighted section for d = 0 … side, or a lower bound on it: (filter, side + 1)."""
    side = len(weights)

    def whole(g):
        return _sum_tails(torch.linalg.eigvalsh(weights[:, None] * section(g) * weights), side)

    if side <= DENSE_SECTION:
        return whole(g)
    start = weights * _start(COMPRESSED, g[:, :side])
    basis = torch.linalg.qr((weights * hankel_product(g, start[None])).mT)[0].mT
    compressed = (weights * hankel_product(g, weights * basis)) @ basis.mT
    tails = _sum_tails(torch.linalg.eigvalsh((compressed + compressed.mT) / 2), side)
    # Energy lost in the compression is missing from every tail. Where much is lost, decompose the section in full.
    square = weights.square()
    places = torch.fft.irfft(torch.fft.rfft(square, n=2 * side).square(), n=2 * side)[: 2 * side - 1]  # Σ w_i² w_{t-i}²
    energy = (g[:, : 2 * side - 1].square() * places).sum(1)
    poor = (energy - tails[:, 0].square()).clamp_min(0).sqrt() > tails[:, COMPRESSED // 3] + 1e-7 * tails[:, 0]
    if side <= LARGEST_WHOLE:
        for rows in pieces(int(poor.sum()), 32 * side**2):
            index = poor.nonzero()[rows, 0]
            tails[index] = whole(g[index])
    return tails


def _sum_tails(values, side):
    sizes = values.abs().sort(dim=1, descending=True)[0]
    sizes = (sizes - 4 * side * EPSILON * sizes[:, :1]).clamp_min(0) if side else sizes
    tails = sizes.square().flip(1).cumsum(1).flip(1).sqrt()
    return torch.nn.functional.pad(tails, (0, side + 1 - sizes.shape[1]))
