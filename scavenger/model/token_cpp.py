"""One token through a whole student in machine code, on a CPU, where calls of torch cost more than what they compute.

All addresses are put into structures once for a cache, whose states stay where they are; a token is then one call. The
source is that of step_cpp.py.
"""

import ctypes

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .attention import WindowedAttention
from .capture import Buffers, OfOneCache
from .norm import RMSNorm
from .step import norm_words, prepared, ready
from .step_cpp import Arguments, address, compiled, step_arguments


# Rows times weights of a layer up to which it pays: with more, products of packed weights are quicker. Measured on two
# cores for layers of 0.3 to 7 million weights: 1.1 to 1.5 times as quick at 21 million, 1.1 from 42 to 89 million.
WORK = 3e7
# The source's activations by their names in transformers.
ACTIVATIONS = {"gelu": 0, "gelu_new": 1, "gelu_pytorch_tanh": 1, "gelu_fast": 1, "silu": 2, "swish": 2, "relu": 3}


def _structure(name, *groups):
    fields = [(field, kind) for kind, fields in groups for field in fields.split()]
    return type(name, (ctypes.Structure,), {"_fields_": fields, "__doc__": "As in the source."})


_INT, _FLOAT, _POINTER = ctypes.c_int64, ctypes.c_double, ctypes.c_void_p
Norm = _structure("Norm", (_POINTER, "weight bias"), (_FLOAT, "eps"), (_INT, "rms"))
Linear = _structure("Linear", (_POINTER, "weight bias"), (_INT, "inputs outputs"))
Block = _structure(
    "Block",
    (Norm, "mixer_norm mlp_norm"),
    (Linear, "q k v join out up gate down"),
    (_INT, "activation parallel"),
    (Arguments, "mixer"),
)
Student = _structure(
    "Student",
    (_INT, "rows layers width words threads"),
    (_POINTER, "ids seen real embedding"),
    (_FLOAT, "embedding_scale"),
    (_POINTER, "blocks"),
    (Norm, "norm"),
    (Linear, "head"),
    (_POINTER, "hidden inner logits"),
)


def knows(model: nn.Module, cache) -> bool:
    """Whether the source knows all of a student, with a cache that has begun."""
    if not unchanged(model):
        return False
    weight = model.lm_head.weight
    products = sum(part.weight.numel() for part in model.modules() if type(part) is nn.Linear)
    parts = [part for part in model.parameters() if part.is_floating_point()]
    return (
        weight.device.type == "cpu"
        and len(cache.real) * products <= WORK * model.config.num_hidden_layers
        and model.config.hidden_act in ACTIVATIONS
        and all(part.dtype == weight.dtype and part.is_contiguous() for part in parts)
        and all(layer.mixer.at_once for layer in model.model.layers)
        and all(ready(weight, layer) for layer in cache.layers)
    )


def unchanged(model: nn.Module) -> bool:
    """Whether a student is made of its own parts and torch's, none of which has a hook or another forward pass.

    Adapters, quantised layers and offloading replace them: then only the modules know what they compute.
    """
    ours = __name__.rpartition(".")[0]
    known = (nn.Linear, nn.Embedding, nn.Identity, nn.LayerNorm, nn.ModuleList)
    return not any(
        "forward" in vars(part)
        or part._forward_hooks
        or part._forward_pre_hooks
        or not (
            type(part) in known
            or type(part).__module__.startswith(ours + ".")
            or type(part).__module__.startswith(("transformers.activations", "torch.nn.modules.activation"))
        )
        for part in model.modules()
    )


class Token(OfOneCache):
    """A step of a student with the states of a cache."""

    def __init__(self, model: nn.Module, cache):
        config, weight = model.config, model.lm_head.weight
        self.model, self.cache, self.weight = model, cache, weight.detach()
        self.buffers = Buffers(cache)
        self.places = [(part, part.data_ptr()) for part in model.parameters()]
        self.entry = compiled().token_float32 if weight.dtype == torch.float32 else compiled().token_float64
        self.scaling = model.model.rotary.scaling
        self.alive = []  # memory that the source reads, also where a parameter gets other memory: model.half()
        rows, pairs = len(cache.real), len(model.model.rotary.inv_freq)
        self.cos, self.sin = self._new(rows, pairs), self._new(rows, pairs)
        self.positions, self.frequencies = cache.real[:, None], model.model.rotary.inv_freq.float()
        self.angles = self.frequencies.new_empty(rows, pairs)
        blocks = [self._block(layer, own) for layer, own in zip(model.model.layers, cache.layers, strict=True)]
        self.blocks = (Block * len(blocks))(*blocks)
        self.student = Student(
            rows=rows,
            layers=len(blocks),
            width=config.hidden_size,
            words=len(model.model.embed.weight),
            threads=torch.get_num_threads(),
            seen=self._address(cache.seen),
            real=self._address(cache.real),
            embedding=self._address(model.model.embed.weight),
            embedding_scale=config.embedding_scale,
            blocks=ctypes.addressof(self.blocks),
            norm=self._norm(model.model.norm),
            head=self._linear(model.lm_head),
            hidden=self._address(self._new(rows, config.hidden_size)),
            inner=self._address(self._new(rows, config.intermediate_size)),
        )

    def serves(self, model: nn.Module, ids: Tensor) -> bool:
        """Whether it computes this model's step: its weights and the tensors of its cache are where they were."""
        return (
            model is self.model and self.buffers.in_place() and all(part.data_ptr() == at for part, at in self.places)
        )

    def __call__(self, ids: Tensor) -> Tensor:  # (row, 1) -> (row, 1, vocabulary)
        ids = ids.long().contiguous()
        torch.mul(self.positions, self.frequencies, out=self.angles)
        for turned, held in ((torch.cos, self.cos), (torch.sin, self.sin)):  # the compiler's differ in the last bit
            held.copy_(turned(self.angles).mul_(self.scaling))
        logits = self.weight.new_empty(len(ids), len(self.weight))
        self.student.ids, self.student.logits = address(ids), address(logits)
        if self.entry(ctypes.byref(self.student)):
            raise IndexError(f"found the tokens {ids.flatten().tolist()}; expected 0 to {self.student.words - 1}")
        return logits[:, None]

    def _block(self, block, layer_cache):
        mixer, mlp = block.mixer, block.mlp
        projections = [mixer.q, mixer.k, mixer.v]
        join = None if isinstance(mixer, WindowedAttention) else mixer.join
        rows = len(self.cos)
        projected = self._new(rows, sum(each.out_features for each in projections))
        gates = None if join is None else self._new(rows, join.out_features)
        y, words = prepared(
            projected, self.cos, self.sin, None, gates=gates, **mixer.step_words(layer_cache, projected.dtype),
            **norm_words(mixer),
        )  # fmt: skip
        arguments, alive = step_arguments(y, *words)
        self.alive += [alive, *(x.detach() for x in tree_leaves((y, words)) if torch.is_tensor(x))]
        gate = getattr(mlp, "gate", None)
        return Block(
            mixer_norm=self._norm(block.mixer_norm),
            mlp_norm=self._norm(block.mlp_norm),
            **dict(zip("qkv", map(self._linear, projections), strict=True)),
            join=self._linear(join),
            out=self._linear(mixer.out),
            up=self._linear(mlp.up),
            gate=self._linear(gate),
            down=self._linear(mlp.down),
            activation=ACTIVATIONS[self.model.config.hidden_act],
            parallel=self.model.config.parallel_residual,
            mixer=arguments,
        )

    def _norm(self, norm):
        bias = getattr(norm, "bias", None)
        return Norm(self._address(norm.weight), self._address(bias), norm.eps, isinstance(norm, RMSNorm))

    def _linear(self, layer):
        if layer is None:
            return Linear()
        return Linear(*map(self._address, (layer.weight, layer.bias)), layer.in_features, layer.out_features)

    def _new(self, *shape):
        return self.weight.new_empty(shape)

    def _address(self, x):
        if x is not None:
            self.alive.append(x.detach())
        return address(x)
