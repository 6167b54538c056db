"""The Hankel matrix of a filter: the singular values that decide its state size, and the floors they prove.

A filter's taps after the first, g_t = h_{t+1}, are a state-space response exactly when the Hankel matrix H_ij = g_{i+j}
has finite rank: a recurrence of d real states has rank d at most. The first tap needs no state; it is the direct term.
"""

import numpy as np
from numpy.typing import NDArray
from scipy import linalg


def hankel_matrix(g: NDArray) -> NDArray:
    """H_ij = g_{i+j}, zero past the last tap: (length,) to (length, length), symmetric."""
    return linalg.hankel(g)


def hankel_eigen(g: NDArray) -> tuple[NDArray, NDArray]:
    """Eigenvalues and eigenvectors of H, largest modulus first; |eigenvalue| are the Hankel singular values.

    Dense, O(length³).
    """
    values, vectors = linalg.eigh(hankel_matrix(g), check_finite=True)
    order = np.argsort(-np.abs(values))
    return values[order], vectors[:, order]


def relative_floors(g: NDArray) -> NDArray:
    """For d = 0, 1, …: no recurrence of d real states has a relative l2 error below the d-th entry, by any method.

    With w_i² = C(2i, i)/4^i the squares convolve to ones, (w² * w²)_t = 1, so ‖W H W‖_F² over the section that has all
    its taps is at most ‖g‖², and by Eckart and Young (1936) the error of any rank d is at least
    Σ_{k>d} σ_k(W H W)². H is the section of side ⌊(length + 1)/2⌋, so the floor needs no tap past the horizon.
    """
    side = (len(g) + 1) // 2
    index = np.arange(1, side)
    weights = np.sqrt(np.concatenate([[1.0], np.cumprod((2 * index - 1) / (2 * index))]))
    section = linalg.hankel(g[:side], g[side - 1 : 2 * side - 1])
    squares = linalg.svdvals(weights[:, None] * section * weights) ** 2
    tails = np.concatenate([np.cumsum(squares[::-1])[::-1], [0.0]])
    return np.sqrt(tails / np.sum(g**2))


def gain_floors(values: NDArray) -> NDArray:
    """For d = 0, 1, …: no stable recurrence of d real states has a worst-case gain error below σ_{d+1}.

    `values` as from hankel_eigen. Adamyan, Arov and Krein (1971).
    """
    return np.append(np.abs(values), 0.0)
