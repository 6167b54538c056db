"""What a family of teachers is described by, and what follows from it."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from scavenger.model.rotary import adjacent_pairs


# Rotary embeddings with other frequencies for longer inputs; a student has one set of frequencies.
CHANGING = ("dynamic", "longrope")
TURNED = re.compile(r"model\.layers\.(\d+)\.mixer\.(q|k|q_norm|k_norm)\.")  # parameters with a row for each channel


@dataclass(frozen=True)
class Family:
    """A family of teachers, as transformers implements it."""

    model: type[PreTrainedModel]
    config: type[PreTrainedConfig]
    rotary: type[nn.Module]
    attention: str  # the name of the attention in a block
    names: dict[str, str | tuple[str, ...]]  # of modules: the teacher's, the student's; {} is the number of a block
    block: Callable[[PreTrainedConfig], dict]  # the fields of HyenaConfig that describe blocks and head
    trained: Callable[..., dict]  # the shape of a teacher that a recipe trains, from its TeacherTraining
    # The parameters in the student's form where it is not the teacher's own.
    prepared: Callable[[dict[str, Tensor], PreTrainedConfig], dict[str, Tensor]] = lambda weights, config: weights

    def blocks(self, teacher: PreTrainedModel) -> nn.ModuleList:
        """The blocks of a teacher."""
        return teacher.base_model.layers

    def attentions(self, teacher: PreTrainedModel) -> list[nn.Module]:
        """The attention of each block of a teacher."""
        return [getattr(block, self.attention) for block in self.blocks(teacher)]

    def outputs(self, teacher: PreTrainedModel) -> list[nn.Module]:
        """The output projection of each attention, whose input has the outputs of all heads of q side by side."""
        (name,) = (own for own, student in self.names.items() if student == "model.layers.{}.mixer.out")
        return [getattr(attention, name.rpartition(".")[2]) for attention in self.attentions(teacher)]

    def frequencies(self, config: PreTrainedConfig) -> tuple[Tensor, float]:
        """The rotary frequencies, float32 (turned pair,), and the factor of cos and sin, as transformers computes them.

        Raises ValueError for frequencies that change with the length of the input.
        """
        kind = config.rope_parameters.get("rope_type", "default")
        if kind in CHANGING:
            raise ValueError(f"its rotary embedding is of type {kind}, which changes with the length of the input")
        with torch.device("cpu"):
            made = self.rotary(config)
        return made.inv_freq.float(), float(made.attention_scaling)

    def cache_numbers(self, config: PreTrainedConfig) -> int:
        """Numbers that a teacher's KV cache holds for each token: keys and values of all layers."""
        block = self.block(config)
        return 2 * config.num_hidden_layers * block["num_key_value_heads"] * block["head_dim"]

    def student_weights(self, teacher: PreTrainedModel, attention_layers: Sequence[int]) -> dict[str, Tensor]:
        """The teacher's parameters and rotary frequencies under the student's names.

        In layers that do not keep attention, the turned pairs of q's and k's channels are moved side by side. Raises
        KeyError for a parameter that is not in `names`.
        """
        frequencies, _ = self.frequencies(teacher.config)
        head_dim = self.block(teacher.config)["head_dim"]
        found = {"model.rotary.inv_freq": frequencies}
        for key, value in self.prepared(teacher.state_dict(), teacher.config).items():
            for name in self._student_names(key):
                turned = TURNED.match(name)
                if turned and int(turned[1]) not in attention_layers:
                    found[name] = adjacent_pairs(value, head_dim, 2 * len(frequencies))
                else:
                    found[name] = value
        return found

    def _student_names(self, key):
        module, parameter = key.rsplit(".", 1)
        names = self.names[re.sub(r"\.\d+\.", ".{}.", module)]
        numbers = re.findall(r"\.(\d+)\.", module)
        return [f"{name.format(*numbers)}.{parameter}" for name in ([names] if isinstance(names, str) else names)]
