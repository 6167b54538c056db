"""One token through a mixer at once: short convolution, norms and rotary turn of q and k, windows, modes and gates.

`next_token` does all that a mixer does between its projections, in one pass over its state where torch takes dozens of
calls: in C++ on a CPU (step_cpp.py), as one Triton kernel on a GPU (step_triton.py). Where there is neither a compiler
nor Triton, or where a mixer has parts that they do not know, the mixer goes on in torch, whose results are the same to
rounding.
"""

import re

import torch
from torch import Tensor, library, nn

from .modal import may_overwrite
from .norm import RMSNorm
from .step_cpp import compiled, step_in_cpp


def fits(config) -> bool:
    """Whether `step` knows all parts of a student's mixers."""
    known_norm = not config.qk_norm or config.norm == "rms"
    within_heads = not config.num_filters or config.head_dim % config.filter_head_width == 0
    return config.hyena_order == 1 and config.features == "none" and known_norm and within_heads


def ready(projected: Tensor, cache) -> bool:
    """Whether `step` can read a token here: without gradients, on a device for which it is compiled."""
    if projected.is_cuda:
        from .step_triton import installed  # here: only a GPU needs Triton, whose import takes time

        known = installed()
    else:
        known = projected.device.type == "cpu" and projected.dtype in (torch.float32, torch.float64) and available()
        known = known and all(x.dtype in (projected.dtype, torch.bool) for x in cache.states)
    return known and all(x.is_contiguous() for x in cache.states) and may_overwrite(cache.states)


@torch.compiler.assume_constant_result
def available() -> bool:
    """Whether there is a step in C++."""
    return compiled() is not None


def next_token(
    mixer: nn.Module,
    projected: Tensor,  # (batch, 1, channel of q, k and v)
    gates: Tensor | None,  # (batch, 1, 2 · filtered head of q)
    cos: Tensor,  # (batch, 1, turned pair)
    sin: Tensor,
    mask: Tensor | None,  # (batch or 1, 1)
    layer_cache,
) -> Tensor:  # (batch, 1, channel of q)
    """`step` of a mixer for one token; an operator where torch.compile draws a graph."""
    real = None if mask is None else mask[:, 0].bool().expand(len(projected))
    gates = None if gates is None else gates[:, 0]
    run = step_operator if torch.compiler.is_compiling() else step
    words = mixer.step_words(layer_cache, projected.dtype) | norm_words(mixer)
    return run(projected[:, 0], cos[:, 0], sin[:, 0], real, gates=gates, **words)[:, None]


def norm_words(mixer: nn.Module) -> dict:
    """The arguments of `step` that the norms of q and k decide."""
    norms = [norm for norm in (mixer.q_norm, mixer.k_norm) if isinstance(norm, RMSNorm)]
    return {"norms": [norm.weight for norm in norms], "eps": norms[0].eps if norms else 0.0}


def step(
    projected: Tensor,  # (batch, channel of q, k and v), zero where a row has no token
    cos: Tensor,  # (batch, turned pair)
    sin: Tensor,
    real: Tensor | None,  # (batch,) whether a row has a token; None: all
    taps: Tensor | None,  # (channel of q, k and v, tap); None: no short convolution
    norms: list[Tensor],  # the weights of the norms of q and k, each (channel of a head,); or none
    gates: Tensor | None,  # (batch, 2 · filtered head of q), before the sigmoid
    places: list[int],  # of each head of k and v: that among those that keep attention, or -1 - that among the others
    conv_state: Tensor | None,  # (batch, tap - 1, channel)
    near: list[Tensor],  # of the ring beside the filters: keys, values, real, written; or none
    kept: list[Tensor],  # of the ring of the heads that keep attention; or none
    modes: list[Tensor],  # Re and Im of poles and of residues, (2, mode), direct, first, size, (filter,); or none
    state: Tensor | None,  # of the modes
    queries: int,  # heads of q for each of k and v
    own_state: bool,  # whether each head of q has filters and states of its own
    turned: bool,  # whether q and k are turned
    adjacent: bool,  # whether turned pairs are adjacent channels
    scale: float,  # of q before the filters
    eps: float,  # of the norms
) -> Tensor:  # (batch, channel of q)
    """The output of a mixer before its last projection; conv_state, rings and state move on by one token, in place."""
    y, words = prepared(
        *(projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state),
        *(queries, own_state, turned, adjacent, scale, eps),
    )
    if projected.is_cuda:
        from .step_triton import step_in_triton as run
    else:
        run = step_in_cpp
    run(y, *words)
    return y


def prepared(
    projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state, queries, own_state,
    turned, adjacent, scale, eps,
):  # fmt: skip
    """An empty output, and the arguments of the compiled steps after it."""
    batch = len(projected)
    of_rows = [x for x in (cos, sin, real, gates, conv_state, *near[:3], *kept[:3], state) if x is not None]
    if any(len(x) != batch for x in of_rows):  # the compiled step would read beyond the end of it
        raise ValueError(f"found {[len(x) for x in of_rows]} rows beside {batch} of q, k and v; expected as many")
    width = projected.shape[1] // (len(places) * (queries + 2))
    y = projected.new_empty(batch, len(places) * queries * width)
    groups = 0  # of channels of a head, each with a filter
    if modes:
        filtered = len(places) - (kept[0].shape[1] if kept else 0)
        groups = len(modes[2]) // (filtered * (queries if own_state else 1))
    return y, (
        *(projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state),
        *(width, queries, groups, own_state, cos.shape[-1] if turned else 0, adjacent, scale, eps),
    )


# An operator for torch.compile. Named after the module, as this file can be loaded twice, from the package and from a
# checkpoint.
step_operator = library.custom_op(
    re.sub(r"\W", "_", __name__) + "::mixer_step", step, mutates_args=("conv_state", "near", "kept", "state")
)


@step_operator.register_fake
def _(projected, cos, sin, real, taps, norms, gates, places, conv_state, near, kept, modes, state, queries, *rest):
    return projected.new_empty(len(projected), projected.shape[1] * queries // (queries + 2))
