"""The long filters of a layer: implicit (a network of the position), modal (poles and residues), or positive.

Positive filters are modal ones with real poles and residues above zero.
"""

import functools
import math

import torch
from torch import Tensor, nn
from transformers.utils import logging

from .modal import Layout, Modes
from .precision import WideModule, full_float32


logger = logging.get_logger(__name__)

FADED = 1e-2  # relative amplitude of a filter after its window
FASTEST = 0.2  # the fastest filter's window as a share of the slowest's: 0.3 of 1.5 (arXiv:2302.10866, appendix)
MAX_RADIUS = 0.9999  # of a trained pole; the same limit as in the reduction of filters
FADING = 512  # tokens in which the slowest mode of an untrained modal filter falls to 1/e; our guess


class ImplicitFilter(WideModule):
    """h_t = exp(-δ t/L) · FFN(features(t/L)) + D [t = 0], for every filter of a layer.

    Features are the time and sines and cosines of it; the network has sine activations with trained frequencies. The
    decays δ are fixed and spread linearly over the filters: the slowest decays to 1 % in `window` · L tokens, the
    fastest in a fifth of that. L is the context length of training. Taps beyond it follow the same formula, untrained:
    there the sines and cosines begin to repeat. Taps are float32 or wider. Source: arXiv:2302.10866, section 3.3 and
    appendix.

    With `hyena_order` n there are n sets of `num_filters`, one after the other. All but the last start with D = 1, to
    pass their input through, so that a full recurrence starts close to the student with one long convolution.
    """

    def __init__(
        self,
        num_filters: int,
        hyena_order: int,
        width: int,
        position_features: int,
        sine_frequency: float,
        context_length: int,
        window: float,
    ):
        super().__init__()
        self.hyena_order = hyena_order
        self.num_filters = num_filters * hyena_order
        self.position_features = position_features
        self.sine_frequency = sine_frequency
        self.context_length = context_length
        self.window = window
        self.inner = nn.ModuleList(
            [nn.Linear(position_features, width), nn.Linear(width, width), nn.Linear(width, width)]
        )
        self.head = nn.Linear(width, self.num_filters, bias=False)
        self.frequency = nn.Parameter(torch.full((width,), sine_frequency))
        self.direct = nn.Parameter(torch.zeros(self.num_filters))
        self.reset_parameters()

    def reset_parameters(self):
        for layer in [*self.inner, self.head]:
            layer.reset_parameters()
        nn.init.constant_(self.frequency, self.sine_frequency)
        with torch.no_grad():
            self.direct.fill_(1)
            self.direct.chunk(self.hyena_order)[-1].zero_()

    def forward(self, length: int) -> Tensor:  # (filter, length)
        device = self.direct.device
        with torch.autocast(device.type, enabled=False), full_float32():
            wide = torch.promote_types(self.direct.dtype, torch.float32)
            hidden, decay, now = self._constants(length, device, wide)
            for layer in self.inner:
                hidden = torch.sin(
                    self.frequency.to(wide) * nn.functional.linear(hidden, layer.weight.to(wide), layer.bias.to(wide))
                )
            taps = (hidden @ self.head.weight.to(wide).T).T
            return torch.addcmul(self.direct.to(wide)[:, None] * now, taps, decay)

    def warn_beyond_training(self, length: int):
        """Warn once where a sequence is longer than those of training."""
        if length > self.context_length and not torch.compiler.is_compiling():
            logger.warning_once(
                f"a sequence is longer than the {self.context_length} tokens that the implicit filters were trained "
                "on; their taps beyond that length are untrained"
            )

    def _constants(self, length, device, dtype):
        """The network's input (length, feature), the decay of each filter (filter, length), and [t = 0] (length)."""
        filters = self.num_filters // self.hyena_order
        settings = length, self.position_features, filters, self.hyena_order, self.context_length, self.window
        # A training asks for the same length again and again. In decoding lengths grow, so nothing is kept there.
        # In a plan tensors have no numbers, and parameters are of another type.
        keeps = torch.is_grad_enabled() and type(self.direct) is nn.Parameter and not torch.compiler.is_compiling()
        return (_kept_constants if keeps else _constants)(*settings, device, dtype)


def _constants(length, features, filters, hyena_order, context_length, window, device, dtype):
    time = torch.arange(length, device=device, dtype=dtype)
    bands = (features - 1) // 2
    frequencies = torch.linspace(1e-4, max(bands - 1, 1e-4), bands, device=device, dtype=dtype)
    angle = 2 * math.pi * time[:, None] / context_length * frequencies
    slowest = -math.log(FADED) / window
    decay = torch.linspace(slowest, slowest / FASTEST, filters, device=device, dtype=dtype).repeat(hyena_order)
    return (
        torch.cat([time[:, None] / (context_length - 1), angle.cos(), -angle.sin()], dim=1),
        torch.exp(-decay[:, None] * time / context_length),
        (time == 0).to(dtype),
    )


@functools.lru_cache(maxsize=8)  # layers with as many filters share an entry
def _kept_constants(*settings):
    with torch.inference_mode(False):  # else a training could not use them later
        return _constants(*settings)


class ModalFilter(WideModule):
    """h_t = Re Σ_m R_m λ_m^t + D [t = 0]; `state_sizes` gives the number of modes of each filter.

    Poles and residues are stored as two real numbers each; half-precision poles would cause errors of several per cent
    over a thousand taps.
    """

    def __init__(self, state_sizes: list[int]):
        super().__init__()
        self.state_sizes = list(state_sizes)
        self._layouts = {}
        self.make_parameters(sum(state_sizes))
        self.reset_parameters()

    def make_parameters(self, modes: int):
        self.pole = nn.Parameter(torch.zeros(modes, 2))  # real and imaginary part
        self.residue = nn.Parameter(torch.zeros(modes, 2))
        self.direct = nn.Parameter(torch.zeros(len(self.state_sizes)))

    def _spread(self):
        """For each mode its place among those of its filter, between 0 and 1, how many these are, and a decay rate.

        Modes decay to 1/e in 1 to FADING tokens, evenly on a logarithmic scale.
        """
        share = torch.cat([torch.zeros(0), *((torch.arange(size) + 0.5) / size for size in self.state_sizes)])
        sizes = torch.cat([torch.zeros(0), *(torch.full((size,), float(size)) for size in self.state_sizes)])
        return share, sizes, 1 / FADING**share

    def reset_parameters(self):
        """Initialise modes to decay in 1 to FADING tokens; the slower a mode, the lower its largest frequency."""
        share, sizes, rate = self._spread()
        radius = torch.exp(-rate)
        angle = math.pi * torch.rand(len(share)) * (1 - share)
        with torch.no_grad():
            self.pole.copy_(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1))
            self.residue.copy_(((1 - radius) / sizes)[:, None] * torch.randn(len(share), 2))
            self.direct.zero_()

    @torch.no_grad()
    def stabilise(self):
        """Move poles outside the disc of MAX_RADIUS back to its edge, keeping their angles."""
        self.pole.mul_((MAX_RADIUS / self.pole.norm(dim=1, keepdim=True)).clamp(max=1))

    @property
    def num_filters(self) -> int:
        return len(self.state_sizes)

    @property
    def dtype(self) -> torch.dtype:
        return next(self.parameters()).dtype

    @property
    def poles(self) -> Tensor:  # (mode,) complex
        # Not a view: memory-mapped parameters may not be aligned as complex numbers, which crashes kernels.
        return torch.complex(*self.pole.unbind(1))

    @property
    def residues(self) -> Tensor:  # (mode,) complex
        return torch.complex(*self.residue.unbind(1))

    def modes(self, part: int = 0, parts: int = 1) -> Modes:
        """The modes of one of `parts` equal groups of filters: a full recurrence has one for each long convolution."""
        count = self.num_filters // parts
        own = slice(part * count, (part + 1) * count)
        first = sum(self.state_sizes[: own.start])
        modes = slice(first, first + sum(self.state_sizes[own]))
        poles, residues = self.poles[modes], self.residues[modes]
        key = part, parts, poles.device
        if key not in self._layouts:
            self._layouts[key] = Layout(self.state_sizes[own], poles.device)
        # A clone, as a view would lose its memory where parameters are sharded.
        return Modes(poles, residues, self.direct[own].clone(), self._layouts[key], self.real)

    real = False  # poles and residues are complex

    def forward(self, length: int, parts: int = 0) -> Tensor | tuple[Tensor, list[Modes]]:
        """The taps (filter, length); with `parts`, also the modes of so many equal groups of filters.

        Mixers get their modes here: a module that is sharded or offloaded is whole inside its own forward only.
        """
        with full_float32():
            taps = self.modes().taps(length)
        return (taps, [self.modes(part, parts) for part in range(parts)]) if parts else taps


class PositiveFilter(ModalFilter):
    """h_t = Σ_m c_m ρ_m^t + D [t = 0] with c_m > 0 and 0 < ρ_m < 1: positive, and falling at every lag.

    Parameters are log c_m and the logarithm of the decay rate -log ρ_m, so that every value of them is such a filter. D
    is 0 in training; a reduction sets it, so that the first tap is exact. A mode's state is real and has half the
    numbers of a complex one's.
    """

    real = True

    def make_parameters(self, modes: int):
        self.log_rate = nn.Parameter(torch.zeros(modes))
        self.log_weight = nn.Parameter(torch.zeros(modes))
        self.register_buffer("direct", torch.zeros(len(self.state_sizes)))

    def reset_parameters(self):
        """Initialise modes to decay in 1 to FADING tokens, each summing to a share of one."""
        _, sizes, rate = self._spread()
        with torch.no_grad():
            self.log_rate.copy_(rate.log())
            self.log_weight.copy_(torch.log((1 - torch.exp(-rate)) / sizes))
            self.direct.zero_()

    def stabilise(self):
        """Nothing to do: every decay rate is positive."""

    @property
    def poles(self) -> Tensor:  # (mode,) complex, with an imaginary part of zero
        return _as_complex(torch.exp(-self.log_rate.exp()))

    @property
    def residues(self) -> Tensor:  # (mode,) complex, with an imaginary part of zero
        return _as_complex(self.log_weight.exp())


def _as_complex(x):
    return torch.complex(x, torch.zeros_like(x))
