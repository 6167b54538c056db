"""The long filters of a layer: implicit (a network of the position) or modal (poles and residues)."""

import math

import torch
from torch import Tensor, nn

from .modal import Modes


SLOWEST_DECAY = -math.log(1e-2) / 1.5  # per context length: 1 % of the amplitude is left after 1.5 contexts
FASTEST_DECAY = -math.log(1e-2) / 0.3  # and here after 0.3 contexts (arXiv:2302.10866, appendix)


class WideFilter(nn.Module):
    """A filter whose parameters stay in float32 or wider whatever the model's dtype."""

    def _apply(self, fn, recurse=True):
        def keep_wide(tensor):
            moved = fn(tensor)
            half = moved.dtype in (torch.float16, torch.bfloat16)
            return tensor.to(device=moved.device) if half else moved

        return super()._apply(keep_wide, recurse)


class ImplicitFilter(WideFilter):
    """h_t = exp(-δ t/L) · FFN(features(t/L)) + D [t = 0], for every filter c of a layer.

    Features are time and sines and cosines of it; the network has sine activations of a trained frequency; the decays δ
    are spread linearly over the filters and not trained. L is the context length of training; positions beyond it go on
    along the same formula. Source: arXiv:2302.10866, section 3.3 and appendix. Taps are float32 or wider.

    With `hyena_order` n there are n sets of `num_filters`, one after the other. All but the last start with D = 1, to
    pass their input on, so that a full recurrence starts near the student with one long convolution.
    """

    def __init__(
        self,
        num_filters: int,
        hyena_order: int,
        width: int,
        position_features: int,
        sine_frequency: float,
        context_length: int,
    ):
        super().__init__()
        self.hyena_order = hyena_order
        self.num_filters = num_filters * hyena_order
        self.position_features = position_features
        self.sine_frequency = sine_frequency
        self.context_length = context_length
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
        with torch.autocast(device.type, enabled=False):
            wide = torch.promote_types(self.direct.dtype, torch.float32)
            time = torch.arange(length, device=device, dtype=wide)
            hidden = self._features(time)
            for layer in self.inner:
                hidden = torch.sin(
                    self.frequency.to(wide) * nn.functional.linear(hidden, layer.weight.to(wide), layer.bias.to(wide))
                )
            taps = (hidden @ self.head.weight.to(wide).T).T
            spread = self.num_filters // self.hyena_order
            decay = torch.linspace(SLOWEST_DECAY, FASTEST_DECAY, spread, device=device, dtype=wide)
            decay = decay.repeat(self.hyena_order)
            taps = taps * torch.exp(-decay[:, None] * time / self.context_length)
            return torch.cat([taps[:, :1] + self.direct.to(wide)[:, None], taps[:, 1:]], dim=1)

    def _features(self, time):
        bands = (self.position_features - 1) // 2
        frequencies = torch.linspace(1e-4, max(bands - 1, 1e-4), bands, device=time.device, dtype=time.dtype)
        angle = 2 * math.pi * time[:, None] / self.context_length * frequencies
        return torch.cat([time[:, None] / (self.context_length - 1), angle.cos(), -angle.sin()], dim=1)


class ModalFilter(WideFilter):
    """h_t = Re Σ_m R_m λ_m^t + D [t = 0]; `state_sizes` gives the modes of each filter.

    Poles and residues are stored as two real numbers each; half-precision poles would be off by whole per cents over a
    thousand taps.
    """

    def __init__(self, state_sizes: list[int]):
        super().__init__()
        self.state_sizes = list(state_sizes)
        self._mode_filter = None
        modes = sum(state_sizes)
        self.pole = nn.Parameter(torch.zeros(modes, 2))  # real and imaginary part
        self.residue = nn.Parameter(torch.zeros(modes, 2))
        self.direct = nn.Parameter(torch.zeros(len(state_sizes)))

    @property
    def num_filters(self) -> int:
        return len(self.state_sizes)

    @property
    def poles(self) -> Tensor:  # (mode,) complex
        return torch.view_as_complex(self.pole)

    @property
    def residues(self) -> Tensor:  # (mode,) complex
        return torch.view_as_complex(self.residue)

    @property
    def mode_filter(self) -> Tensor:  # (mode,) the filter of each mode
        if self._mode_filter is None or self._mode_filter.device != self.pole.device:
            owners = [index for index, size in enumerate(self.state_sizes) for _ in range(size)]
            with torch.inference_mode(False):  # it will serve a backward pass too
                self._mode_filter = torch.tensor(owners, dtype=torch.long, device=self.pole.device)
        return self._mode_filter

    def modes(self, part: int = 0, parts: int = 1) -> Modes:
        """The modes of one of `parts` equal runs of filters, as a full recurrence has one for each long convolution."""
        if parts == 1:
            return Modes(self.poles, self.residues, self.mode_filter, self.direct)
        count = self.num_filters // parts
        first, last = part * count, (part + 1) * count
        own = slice(sum(self.state_sizes[:first]), sum(self.state_sizes[:last]))
        return Modes(self.poles[own], self.residues[own], self.mode_filter[own] - first, self.direct[first:last])

    def forward(self, length: int) -> Tensor:  # (filter, length)
        return self.modes().taps(length)
