"""On PYTHONPATH of tests that launch DeepSpeed: without this its first start compiles a library, for minutes.

That library is a quicker all-reduce in shared memory; without it gloo does the same.
"""

import os


if "LOCAL_RANK" in os.environ and os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
