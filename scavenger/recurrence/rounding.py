"""What a state kept in bfloat16 costs: a proven bound for each filter, and the divergence on text.

Between tokens a state is rounded to 8 bits; all else is computed in float32, whose rounding is not counted here.
"""

import numpy as np
import torch
from torch import Tensor

from scavenger import measure
from scavenger.model import HyenaForCausalLM
from scavenger.model.filters import ModalFilter


DTYPE = torch.bfloat16
UNIT = 2.0**-8  # the most that rounding to the nearest of 8 bits changes a number, as a share of it
SEQUENCES, TOKENS = 4, 256  # of the text that is read token by token


@torch.no_grad()
def bounds(filter: ModalFilter, tokens: int) -> Tensor:  # (filter,) float64
    """The most that rounding moves an output within so many tokens, as a share of the largest output, for every input.

    A kept state is s_t = (1 + δ) (λ s_{t-1} + u_t) with |δ| ≤ ε, by components. For |u| ≤ 1, a = |λ|, and x the exact
    state, from S = E = 0 before the first token,

        E_t = a E_{t-1} + ε (a S_{t-1} + 1)     bounds |s_t - x_t|
        S_t = (1 + ε) (a S_{t-1} + 1)           bounds |s_t|

    An output reads the state before it is rounded, and so moves by at most Σ_m |R_m| a_m E_{t-1,m}. The largest output
    of the exact filter for such inputs is Σ_t |h_t|. E does not fall with t: the bound is that of the last token.
    """
    poles, residues = (z.to(torch.complex128).abs().cpu() for z in (filter.poles, filter.residues))
    size, error = torch.zeros(2, len(poles), dtype=torch.float64)
    for _ in range(tokens - 1):
        unrounded = poles * size + 1
        error = poles * error + UNIT * unrounded
        size = (1 + UNIT) * unrounded
    moved = torch.stack([part.sum() for part in (residues * poles * error).split(filter.state_sizes)])
    largest = filter(tokens).double().abs().sum(1).cpu()
    return moved / largest.clamp_min(1e-300)


@torch.no_grad()
def on_text(recurrent: HyenaForCausalLM, blocks: np.ndarray) -> dict:
    """KL(float32 state || bfloat16 state) and equal top-1 of one student, both reading blocks token by token."""
    ids = torch.from_numpy(blocks[:SEQUENCES, :TOKENS].astype(np.int64))
    exact, rounded = (recurrent.batch_decoder(len(ids), state_dtype) for state_dtype in (None, DTYPE))
    sums = torch.zeros(4, dtype=torch.float64, device=recurrent.device)
    for tokens in ids.to(recurrent.device).T:
        # In float64: the divergence is of the size of float32's rounding.
        sums += measure.compared(rounded.step(tokens).double(), tokens, exact.step(tokens).double()).sum(1)
    _, agreement, divergence, _ = (sums / ids.numel()).tolist()
    return {
        "divergence": divergence,
        "agreement": agreement,
        "tokens": ids.numel(),
        "positions": ids.shape[1],
    }


def facts(recurrent: HyenaForCausalLM, blocks: np.ndarray | None, bounds: list[float], itemsize: int) -> dict | None:
    """What the certificate says of a state in bfloat16; None where the state grows."""
    config = recurrent.config
    if config.state_grows:
        return None
    return {
        "state_bytes": config.state_bytes_of(itemsize, DTYPE.itemsize),
        "moved_bytes": config.moved_bytes_of(itemsize, DTYPE.itemsize),
        "moved_break_even_length_16_bit": config.moved_break_even_length_of(2, itemsize, DTYPE.itemsize),
        "largest_bound": max(bounds),
        "model": None if blocks is None else on_text(recurrent, blocks),
    }
