"""Compiles kernels for a GPU that need not be there, and prints the bytes of shared memory that each takes, as JSON.

    python tests/compiled_triton.py MODULE '[[KERNEL, {ARGUMENT: TYPE}, {CONSTANT: VALUE}, {OPTION: VALUE}]]' CAPABILITY

An argument without a type is an integer.
"""

import importlib
import json
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


def shared_memory(kernel, types, constants, options, capability):
    names = kernel.arg_names
    types = {name: "i32" for name in names} | types | dict.fromkeys(constants, "constexpr")
    source = ASTSource(
        kernel,
        {name: types[name] for name in names},
        {(names.index(name),): value for name, value in constants.items()},
        {(names.index(name),): [["tt.divisibility", 16]] for name in names if types[name][0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).metadata.shared


if __name__ == "__main__":
    module, kernels, capability = sys.argv[1:]
    module = importlib.import_module(module)
    kernels = [(getattr(module, name), *own) for name, *own in json.loads(kernels)]
    print(json.dumps([shared_memory(*kernel, int(capability)) for kernel in kernels]))
