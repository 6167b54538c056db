"""A recipe under FSDP2 on the CPU: accelerate takes plain data parallelism there, so it is told that it has FSDP.

torchrun --nproc_per_node 2 tests/launching/sharded.py RECIPE [key=value ...]
"""

import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from scavenger.__main__ import main
from scavenger.run import processes


def told(**options):
    """What accelerate_configs/fsdp.yaml asks for."""
    made = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        reshard_after_forward=True,
        state_dict_type="full_state_dict",
        cpu_ram_efficient_loading=False,
    )
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert made.is_fsdp2
    return made


processes.Accelerator = told
sys.exit(main())
