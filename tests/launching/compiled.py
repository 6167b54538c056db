"""A recipe whose compiled parts are graphs that torch runs operation by operation; under FSDP2 as sharded.py has it.

accelerate launch --config_file accelerate_configs/fsdp.yaml --num_processes 2 tests/launching/compiled.py RECIPE …
"""

import functools
import os
import runpy
import sys

import torch
from torch._dynamo.utils import counters

from scavenger.__main__ import main


torch.compile = functools.partial(torch.compile, backend="aot_eager")
torch._dynamo.config.disable = False  # as the tests' environment variable asks for
code = 0
try:
    if "FSDP_VERSION" in os.environ:
        runpy.run_path("tests/launching/sharded.py", run_name="__main__")
    else:
        code = main()
except SystemExit as ended:
    code = ended.code
if code == 0:
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
sys.exit(code)
