"""The student: everything that inference needs, and nothing else; the folder travels with each saved checkpoint.

Importing it registers the student with transformers' Auto classes.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_hyena_neox import HyenaNeoXConfig
from .modeling_hyena_neox import HyenaCache, HyenaNeoXForCausalLM, HyenaNeoXModel


__all__ = ["HyenaCache", "HyenaNeoXConfig", "HyenaNeoXForCausalLM", "HyenaNeoXModel"]

HyenaNeoXConfig.register_for_auto_class()
HyenaNeoXForCausalLM.register_for_auto_class("AutoModelForCausalLM")
AutoConfig.register(HyenaNeoXConfig.model_type, HyenaNeoXConfig)
AutoModelForCausalLM.register(HyenaNeoXConfig, HyenaNeoXForCausalLM)
AutoModel.register(HyenaNeoXConfig, HyenaNeoXModel)
