"""A decoding step as one CUDA graph: all its kernels are launched at once, without Python between them.

The state of a recurrent student has constant size and a step updates it in place, so one graph serves every token.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


EAGER = 2  # steps before a capture: libraries choose algorithms and allocate workspaces in their first calls


class Buffers:
    """The tensors of a cache, of which a step updates some in place and replaces others."""

    def __init__(self, cache):
        self.held = _tensors(cache)

    def in_place(self) -> bool:
        """Whether the cache still holds these tensors."""
        return all(getattr(holder, name) is buffer for holder, name, buffer in self.held)

    def keep(self):
        """Copy into each buffer what has replaced it, and put the buffer back."""
        for holder, name, buffer in self.held:
            value = getattr(holder, name)
            if value is not buffer:
                buffer.copy_(value)
                setattr(holder, name, buffer)

    def take(self, cache):
        """Copy the tensors of another cache of the same shapes into the buffers."""
        for (holder, name, buffer), (_, _, value) in zip(self.held, _tensors(cache), strict=True):
            buffer.copy_(value)
            setattr(holder, name, buffer)


def _tensors(cache):
    """Each tensor with the object and the name that hold it."""
    holders = [cache, *cache.layers]
    for layer in cache.layers:
        holders += [*layer.rings, *getattr(layer, "modal_states", ())]
    return [
        (holder, name, value) for holder in holders for name, value in vars(holder).items() if torch.is_tensor(value)
    ]


def capturable(x: Tensor) -> bool:
    """Whether a step that reads x may be computed here by other means than the modules of a model."""
    return (
        not torch.is_grad_enabled()
        and not torch.is_autocast_enabled(x.device.type)
        and not torch.compiler.is_compiling()
        and not (x.is_cuda and torch.cuda.is_current_stream_capturing())
    )


class OfOneCache:
    """A step that reads and writes the tensors it was made with, and so is left out of copies of their cache."""

    def __deepcopy__(self, memo):
        return None

    def __reduce__(self):
        return type(None), ()


class CapturedStep(OfOneCache):
    """One more token for a cache as a graph; calling it copies the inputs and replays.

    `advance(*inputs)` has run before with inputs of these shapes. It does not wait for the device.
    """

    def __init__(self, advance: Callable[..., Tensor], model: nn.Module, cache, *inputs: Tensor):
        self.model, self.buffers = model, Buffers(cache)

        def step(*inputs):
            logits = advance(*inputs)
            self.buffers.keep()
            return logits

        with torch.inference_mode(False), torch.no_grad():
            self.inputs = [x.clone() for x in inputs]
            self.replay, self.output = record(step, self.inputs)

    def serves(self, model: nn.Module, *inputs: Tensor) -> bool:
        """Whether the graph reads the weights of this model, these inputs, and the tensors that its cache holds now."""
        return model is self.model and len(inputs) == len(self.inputs) and self.buffers.in_place()

    def __call__(self, *inputs: Tensor) -> Tensor:
        for held, new in zip(self.inputs, inputs, strict=True):
            held.copy_(new)
        self.replay()
        return self.output.clone()  # the next replay overwrites it


def record(function: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Callable[[], None], Tensor]:
    """Capture a call: what replays it, and the output that a replay overwrites. The call itself computes nothing."""
    graph = torch.cuda.CUDAGraph()
    # Other threads may go on: a server reads its requests.
    with torch.cuda.device(inputs[0].device), torch.cuda.graph(graph, capture_error_mode="thread_local"):
        output = function(*inputs)
    return graph.replay, output
