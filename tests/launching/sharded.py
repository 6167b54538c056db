"""A recipe under FSDP2 on the CPU: accelerate uses plain data parallelism there, so we declare its state to be FSDP.

accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/launching/sharded.py RECIPE …
"""

import sys

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

from scavenger.__main__ import main
from scavenger.run import processes


def sharding(**options):
    """An Accelerator with the FSDP plugin of the launch configuration, as accelerate makes it on a GPU."""
    made = Accelerator(**options)
    plugin = FullyShardedDataParallelPlugin()  # from the launcher's environment variables
    if made.mixed_precision != "no":
        plugin.set_mixed_precision(made.mixed_precision)
    PartialState._shared_state["distributed_type"] = DistributedType.FSDP
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert made.is_fsdp2
    return made


processes.Accelerator = sharding
sys.exit(main())
