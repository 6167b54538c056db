"""The kernels of multihyena against the formula: interpreted on the CPU, or compiled on a GPU."""

import sys

import pytest
import reference
import torch
from conftest import LAUNCHED, Graphs, compiled, launch, normal, tiny_student, watched
from reference import assert_close

from scavenger.model import hyena, toeplitz_triton
from scavenger.model.hyena import long_convolution


pytestmark = pytest.mark.usefixtures("interpreted")


KERNELS = "_product", "_columns", "_lags"


def tensors(batch, filters, queries, length, width, value_width, more=0, dtype=torch.float64, *, device):
    """q, k, v, taps and a gradient of y, with the memory that the projections give them."""
    q = normal(batch, length, filters, queries, width, device=device).permute(0, 2, 3, 1, 4)
    k = normal(batch, length, filters, width, device=device).transpose(1, 2)
    v, taps = normal(batch, filters, length, value_width, device=device), normal(filters, length + more, device=device)
    return *(z.to(dtype) for z in (q, k, v)), taps.float(), normal(*q.shape[:-1], value_width, device=device).to(dtype)


def with_gradients(form, q, k, v, taps, dy):
    inputs = [z.detach().requires_grad_() for z in (q, k, v, taps)]
    y = form(*inputs)
    return y, *torch.autograd.grad(y, inputs, dy)


def exactly(q, k, v, taps, dy):
    """The formula in float64, and its gradients, of the numbers as they are."""
    return with_gradients(
        lambda q, *others: reference.for_each_query(reference.mixer, q, *others),
        *(z.double() for z in (q, k, v, taps, dy)),
    )


# Lengths at, below and across blocks of 32 rows, of 64 in half precision; no two sizes are equal where they may differ.
SHAPES = [
    (2, 3, 1, 1, 5, 9),
    (1, 2, 4, 33, 7, 3),  # 2 divides 4: a wrong order of heads is no permutation
    (3, 1, 2, 32, 16, 17),
    (2, 1, 1, 67, 3, 20, 6),  # with taps for a longer input
]


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_kernels_are_the_formula(shape, device):
    """Wherever float32 is float32: PRECISION is "ieee"."""
    given = tensors(*shape, dtype=torch.float32, device=device)
    for slow, fast in zip(exactly(*given), with_gradients(toeplitz_triton.toeplitz_product, *given), strict=True):
        assert fast.dtype == torch.float32
        assert_close(slow, fast.double(), 2e-6)  # measured 1.5e-7


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
def test_half_precision_is_rounded_once(dtype, tolerance, device):
    """Each score and each result once; the gradient of the taps never."""
    given = tensors(1, 1, 1, 67, 5, 9, dtype=dtype, device=device)
    found = with_gradients(toeplitz_triton.toeplitz_product, *given)
    for slow, fast in zip(exactly(*given), found, strict=True):
        assert_close(slow, fast.double(), tolerance if fast.dtype == dtype else 2e-6)
    assert [each.dtype for each in found] == [dtype] * 4 + [torch.float32]


@pytest.mark.slow
def test_any_strides_and_a_constant_gradient(device):
    """Of tensors that are parts of others, in any order of their axes; y.sum() has a gradient without memory."""
    q, k, v, taps, _ = tensors(2, 1, 2, 9, 4, 5, dtype=torch.float32, device=device)
    others = [torch.stack([z, z]).movedim(0, -1)[..., 1] for z in (q, k, v, taps)]
    others[0] = q.transpose(0, 4).contiguous().transpose(0, 4)
    found = []
    for given in ((q, k, v, taps), others):
        given = [z.detach().requires_grad_() for z in given]
        y = toeplitz_triton.toeplitz_product(*given)
        found.append((y, *torch.autograd.grad(y.sum(), given)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


def test_launches(monkeypatch, device):
    """One kernel forward, three backward, for any length and number of filters and queries."""
    kernels = watched(monkeypatch, toeplitz_triton, KERNELS)
    q, k, v, taps, dy = tensors(1, 2, 2, 5, 4, 4, dtype=torch.float32, device=device)
    y = toeplitz_triton.toeplitz_product(q.requires_grad_(), k, v, taps)
    assert [len(kernel.launches) for kernel in kernels] == [1, 0, 0]
    y.backward(dy)
    assert [len(kernel.launches) for kernel in kernels] == [2, 1, 1]


def test_memory_is_linear_in_the_length(monkeypatch, device):
    """All that kernels write to; what they would write is left out."""
    found = []
    for length in (2**12, 2**16):
        with monkeypatch.context() as patch:
            kernels = watched(patch, toeplitz_triton, KERNELS, runs=False)
            with_gradients(
                toeplitz_triton.toeplitz_product, *tensors(1, 3, 2, length, 2, 2, dtype=torch.float32, device=device)
            )
            given = [x for kernel in kernels for call in kernel.launches for x in call]
            found.append(sum(x.numel() for x in given if torch.is_tensor(x)))
    assert found[1] <= 16 * found[0]


@pytest.mark.slow
def test_a_compiled_graph_holds_the_kernels(monkeypatch, device):
    """As one operator each, forward and backward, with the shapes and strides that were promised."""
    torch.library.opcheck(
        toeplitz_triton.toeplitz_product,
        [z.requires_grad_() for z in tensors(1, 1, 1, 5, 4, 3, 2, dtype=torch.float32, device=device)[:4]],
        atol=1e-5,
        rtol=1e-5,
    )
    kernels = watched(monkeypatch, toeplitz_triton, KERNELS)
    given = tensors(1, 1, 1, 7, 4, 3, dtype=torch.float32, device=device)
    plain = with_gradients(toeplitz_triton.toeplitz_product, *given)
    graphs = Graphs()
    compiled = torch.compile(lambda *x: 2 * toeplitz_triton.toeplitz_product(*x), fullgraph=True, backend=graphs)
    for one, other in zip(plain, with_gradients(compiled, *given), strict=True):
        torch.testing.assert_close(2 * one, other)
    assert graphs.count == 1 and [len(kernel.launches) for kernel in kernels] == [4, 2, 2]


@pytest.mark.parametrize(
    "dtype, width, value_width, taken",
    [
        (torch.float32, 7, 128, True),
        (torch.float32, 129, 7, False),
        (torch.bfloat16, 256, 65, True),
        (torch.float16, 64, 257, False),
        (torch.float64, 16, 16, False),
    ],
)
def test_what_the_kernels_are_for(dtype, width, value_width, taken, device):
    v = torch.zeros(2, value_width, dtype=dtype, device=device)
    assert toeplitz_triton.takes(v, width) == (taken and device.type == "cuda")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mixer_takes_the_kernels_where_they_are_for_its_tensors(dtype, monkeypatch, device):
    """As on a GPU; taps stay as they are. A channel of its own, and long inputs of narrow filters, take FFTs."""
    monkeypatch.setattr(hyena, "takes", lambda v, width: v.dtype != torch.float64)
    monkeypatch.setattr(hyena, "GPU_FFT_PAYS", 2)
    kernels = watched(monkeypatch, toeplitz_triton, KERNELS)
    for width, length, launches in ((1, 9, 0), (2, 9, 0), (3, 9, 1)):
        q, k, v, taps, _ = tensors(1, 2, 3, length, width, width, dtype=torch.float32, device=device)
        exact = long_convolution(*(z.double() for z in (q, k, v, taps)))
        found = long_convolution(q, k, v.to(dtype), taps)  # under autocast q and k may be wider
        assert_close(exact, found.double(), 2e-6 if dtype == torch.float32 else 3e-2)
        assert len(kernels[0].launches) == launches


@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu():
    """Into machine code that shares no more memory than any multiprocessor has."""
    sizes = toeplitz_triton.sizes_for(torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16))
    constants = {name: sizes.pop(name) for name in ("BLOCK", "N", "M", "PRECISION")}
    matrices = dict.fromkeys(["q", "k", "v", "dy"], "*bf16")
    kernels = [
        ("_product", {**dict.fromkeys(["q", "k", "v", "y"], "*bf16"), "taps": "*fp32"}, constants, sizes),
        ("_columns", {**matrices, "dk": "*bf16", "dv": "*bf16", "taps": "*fp32"}, constants, sizes),
        ("_lags", {**matrices, "table": "*fp32"}, constants, sizes),
    ]
    shared = compiled(toeplitz_triton, kernels, 90)
    assert max(shared) <= 99 * 2**10, shared


WITHOUT_TRITON = """
import sys
sys.modules["triton"] = None  # an import of it raises ImportError
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.arange(1, 20)[None]
model(input_ids=ids, labels=ids).loss.backward()
print(type(model).__module__)
"""


@pytest.mark.slow
def test_a_saved_student_needs_no_triton(tmp_path):
    tiny_student().float().save_pretrained(tmp_path / "student")
    assert {"toeplitz_triton.py", "window_triton.py"} <= {path.name for path in (tmp_path / "student").iterdir()}
    env = LAUNCHED | {"HF_MODULES_CACHE": str(tmp_path / "modules")}
    done = launch(sys.executable, "-c", WITHOUT_TRITON, tmp_path / "student", env=env)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("transformers_modules.")
