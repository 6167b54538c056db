"""FLOPs of a training, by the shape of its teacher, and the share of a device's rate that it reaches."""

import torch
from accelerate import Accelerator

from scavenger import families, measure
from scavenger.recipe import Logits


class Flops:
    """FLOPs per token: two for each weight in a matrix product, and those of the token mixing.

    Mixing, by attention or by a long convolution as a matrix: the scores and their product with v, causal half. Of a
    student as of its teacher, whose `config` this is.
    """

    def __init__(self, config, length):
        width, self.layers = config.hidden_size, config.num_hidden_layers
        block = families.of(config.model_type).block(config)
        inner, shared = (
            heads * block["head_dim"] for heads in (config.num_attention_heads, block["num_key_value_heads"])
        )
        self.mixer = 4 * width * (inner + shared) + 2 * length * inner
        self.mlp = 2 * width * config.intermediate_size * (3 if block["mlp"] == "gated" else 2)
        self.head = 2 * width * config.vocab_size
        self.whole = self.layers * (self.mixer + self.mlp) + self.head

    def of(self, recipe, phase, layers):
        """FLOPs per token of a phase of the transfer: teacher, student, and the backward pass."""
        if isinstance(phase, Logits):
            read = 0 if recipe.cache and recipe.cache.logits else self.whole
            rest = 1 if phase.trained == "mixers" else 2  # backward pass: gradients of the inputs, and of the weights
            back = self.layers * (2 * self.mixer + rest * self.mlp) + rest * self.head
            return read + self.whole + back
        matched = len(layers)
        deep = max(layers) if phase.schedule != "progressive" else sum(layers) / matched  # layers below the last
        below = deep * (self.mixer + self.mlp)
        read = 0 if recipe.cache and recipe.cache.activations else below + self.mixer
        if phase.schedule == "parallel":
            return read + 3 * matched * self.mixer
        if phase.schedule == "progressive":
            return read + below + 3 * self.mixer
        return read + below + self.mixer + 2 * matched * self.mixer + deep * self.mlp


def peak(accelerator: Accelerator) -> float:
    """FLOP/s of a square matrix product on all devices of a launch, in the dtype that it multiplies in."""
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    return accelerator.num_processes * measure.matrix_rate(accelerator.device, dtype)
