"""The student: everything that inference needs, and nothing else; the folder travels with each saved checkpoint.

Importing it registers the student with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hyena import HyenaConfig
from .modeling_hyena import HyenaCache, HyenaForCausalLM, HyenaModel


__all__ = ["HyenaCache", "HyenaConfig", "HyenaForCausalLM", "HyenaModel"]

HyenaConfig.register_for_auto_class()
HyenaForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register(HyenaConfig.model_type, HyenaConfig)
AutoModelForCausalLM.register(HyenaConfig, HyenaForCausalLM)
AutoModel.register(HyenaConfig, HyenaModel)
