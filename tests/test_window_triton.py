"""The kernels of a window and the filters beyond it against the formula: interpreted on the CPU, or compiled."""

import pytest
import reference
import torch
from conftest import GROUPED, Graphs, Launches, compiled, normal, tiny_student, watched
from reference import assert_close

from scavenger.model import attention, hyena, toeplitz_triton, window_triton
from scavenger.model.window_triton import near_and_far


pytestmark = pytest.mark.usefixtures("interpreted")


KERNELS = "_rows", "_row_gradients", "_column_gradients"
# Batch, filters, queries, length, window, width and taps for a longer input. With blocks of 16 rows: windows that are
# shorter, whole blocks, longer, and of all tokens but one; lengths at, below and across blocks.
SHAPES = [
    (2, 3, 1, 5, 2, 5, 0),
    (1, 2, 3, 35, 3, 7, 0),
    (1, 1, 2, 50, 16, 3, 4),
    (2, 1, 1, 53, 23, 9, 0),
    (1, 1, 1, 49, 35, 17, 1),
    (1, 1, 1, 48, 32, 4, 0),
    (1, 1, 1, 38, 37, 6, 0),
]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Where kernels are interpreted: many tiles of a short length."""
    whole = toeplitz_triton.sizes_for
    if not torch.cuda.is_available():
        for module in (toeplitz_triton, window_triton):
            monkeypatch.setattr(module, "sizes_for", lambda q, v: whole(q, v) | {"BLOCK": 16})


def tensors(batch, filters, queries, length, window, width, more=0, dtype=torch.float32, *, device):
    """q, k, v, taps, gates and a gradient of y, with the memory that the projections give them."""
    q = 2 * normal(batch, length, filters, queries, width, device=device).permute(0, 2, 3, 1, 4)
    k = normal(batch, length, filters, width, device=device).transpose(1, 2)
    v = normal(batch, filters, length, width, device=device)
    taps = normal(filters, length - window + more, device=device)
    gates, dy = normal(batch, length, 2 * filters * queries, device=device), normal(*q.shape, device=device)
    return *(z.to(dtype) for z in (q, k, v)), taps.float(), gates.to(dtype), dy.to(dtype)


def with_gradients(form, *given):
    *inputs, dy = (None if z is None else z.detach().requires_grad_() for z in given)
    y = form(*inputs)
    return y, *torch.autograd.grad(y, [z for z in inputs if z is not None], dy)


def by_kernels(given, window):
    return with_gradients(lambda q, *others: near_and_far(q, *others, window, q.shape[-1] ** -0.5)[0], *given)


def exactly(given, window):
    """The formula in float64, and its gradients, of the numbers as they are."""

    def form(q, k, v, taps, gates):
        taps = q.new_zeros(0, 1) if taps is None else taps
        gates = gates if gates is None else 2 * torch.sigmoid(gates).transpose(1, 2)[..., None]
        y = reference.windowed_mixer(q.flatten(1, 2), k, v, taps, gates, [], window, 0, shared=True)
        return y.unflatten(1, q.shape[1:3])

    return with_gradients(form, *(None if z is None else z.double() for z in given))


def alone(given):
    """Without filters."""
    q, k, v, _, _, dy = given
    return q, k, v, None, None, dy


@pytest.mark.parametrize("shape, filtered", [(own, True) for own in SHAPES] + [(own, False) for own in SHAPES[1::2]])
def test_the_kernels_are_the_formula(shape, filtered, device):
    """Wherever float32 is float32: PRECISION is "ieee"."""
    given, window = tensors(*shape, device=device), shape[4]
    given = given if filtered else alone(given)
    for slow, fast in zip(exactly(given, window), by_kernels(given, window), strict=True):
        assert fast.dtype == torch.float32
        assert_close(slow, fast.double(), 7e-6)  # measured 6.9e-7


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-2), (torch.float16, 8e-3)])
def test_in_half_precision(dtype, tolerance, device):
    """Weights, results and their gradients are rounded; sums and the gradient of the taps are float32."""
    given, window = tensors(1, 2, 2, 37, 11, 9, dtype=dtype, device=device), 11
    found = by_kernels(given, window)
    assert [each.dtype for each in found] == [dtype] * 4 + [torch.float32, dtype]
    for slow, fast in zip(exactly(given, window), found, strict=True):
        assert_close(slow, fast.double(), tolerance)


def test_scores_of_any_size_do_not_overflow(device):
    """The softmax of scores around 1,000 is exact, and the window's weights sum to one."""
    q, k, v, _, _, dy = tensors(1, 2, 1, 37, 20, 5, device=device)
    given = q * 300, k, torch.ones_like(v), None, None, dy
    y, *_ = by_kernels(given, 20)
    assert_close(torch.ones_like(y), y, 1e-6)


def test_any_strides_and_a_constant_gradient(device):
    """Of tensors that are parts of others, in any order of their axes; y.sum() has a gradient without memory."""
    q, k, v, taps, gates, _ = tensors(2, 1, 2, 19, 5, 4, device=device)
    others = [torch.stack([z, z]).movedim(0, -1)[..., 1] for z in (q, k, v, taps, gates)]
    others[0] = q.transpose(0, 4).contiguous().transpose(0, 4)

    def moved(x):  # as a hook that keeps tensors elsewhere
        return torch.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

    found = []
    for given in ((q, k, v, taps, gates), others):
        given = [z.detach().requires_grad_() for z in given]
        with torch.autograd.graph.saved_tensors_hooks(moved, moved):
            y, *_ = near_and_far(*given, 5, 0.5)
        found.append((y, *torch.autograd.grad(y.sum(), given)))
    y, *_ = near_and_far(*given, 5, 0.5)
    found.append((y, *torch.autograd.grad(y.sum(), given)))
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_launches_and_memory(monkeypatch, device):
    """One kernel forward and three backward, without filters two; all that they write is linear in the length."""
    kernels = watched(monkeypatch, window_triton, KERNELS, runs=False)
    lags, *_ = watched(monkeypatch, toeplitz_triton, ["_lags"], runs=False)
    written = []
    for length in (2**12, 2**16):
        given = tensors(1, 3, 2, length, 70, 2, device=device)
        by_kernels(given, 70)
        assert [len(kernel.launches) for kernel in (*kernels, lags)] == [1, 1, 1, 1]
        by_kernels(alone(given), 70)
        assert [len(kernel.launches) for kernel in (*kernels, lags)] == [2, 2, 2, 1]
        calls = [call for kernel in (*kernels, lags) for call in kernel.launches]
        written.append(sum(x.numel() for call in calls for x in call if torch.is_tensor(x)))
        for kernel in (*kernels, lags):
            kernel.launches.clear()
    assert written[1] <= 17 * written[0]


def test_a_compiled_graph_holds_the_kernels(monkeypatch, device):
    """As one operator each, forward and backward, with the shapes and strides that were promised."""
    given = tensors(1, 1, 2, 7, 3, 4, 2, device=device)
    for inputs in (given[:5], alone(given)[:5]):
        inputs = [z if z is None else z.detach().requires_grad_() for z in inputs]
        torch.library.opcheck(near_and_far, (*inputs, 3, 0.5), atol=1e-5, rtol=1e-5)
    kernels = watched(monkeypatch, window_triton, KERNELS)
    plain = by_kernels(given, 3)
    graphs = Graphs()
    drawn = torch.compile(lambda *x: 2 * near_and_far(*x, 3, 0.5)[0], fullgraph=True, backend=graphs)
    for one, other in zip(plain, with_gradients(drawn, *given), strict=True):
        torch.testing.assert_close(2 * one, other)
    assert graphs.count == 1 and [len(kernel.launches) for kernel in kernels] == [2, 2, 2]


def in_torch(calls):
    """`near_and_far` by what it takes the place of, for students of many heads: interpreted kernels are slow."""

    def form(q, k, v, taps, gates, window, scale):
        calls.append(q.shape)
        assert q.dtype == k.dtype == v.dtype and scale == q.shape[-1] ** -0.5 and window < k.shape[2]
        tokens = attention.Tokens(k, v, torch.ones(len(k), k.shape[2], dtype=torch.bool, device=k.device))
        near, _ = attention.attention(q.flatten(1, 2), tokens, window)
        near, count = near.unflatten(1, q.shape[1:3]), k.shape[2] - window
        if taps is None:
            return near, None, None, None
        far = hyena.long_convolution(q[:, :, :, window:] * scale, k[:, :, :count], v[:, :, :count], taps)
        far = torch.nn.functional.pad(far, (0, 0, window, 0))
        gates = (2 * torch.sigmoid(gates)).transpose(1, 2)[..., None].unflatten(1, (2, *q.shape[1:3]))
        return gates[:, 0] * near + gates[:, 1] * far, near, far, None

    return form


def as_on_a_gpu(patch, form):
    for module in (hyena, attention):
        patch.setattr(module, "takes", lambda v, width: True)
        patch.setattr(module, "near_and_far", form)
    patch.setattr(hyena, "toeplitz_product", lambda *given: hyena.ToeplitzProduct.apply(*given))


def curve(model, ids, **options):
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, **options).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


KEPT = {"attention_heads": [[1], [], [0, 4]], "attention_window": 11}


@pytest.mark.parametrize(
    "changes, calls",
    [
        ({"window": 7}, [1, 1, 1]),
        ({"window": 7, **KEPT}, [2, 1, 2]),
        ({"window": 7, **KEPT, "attention_window": 40}, [1, 1, 1]),  # all tokens: torch's own causal attention
        ({"window": 7, "modal": True}, [1, 1, 1]),
        ({"window": 7, "modal": True, "filters": 0}, [1, 1, 1]),
        ({"window": 30}, [0, 0, 0]),
        ({"attention_layers": [1], "attention_window": 9}, [0, 1, 0]),
        ({"window": 7, "filters": 10}, [1, 1, 1]),  # narrower filters: the window by itself
        ({"window": 7, "modal": True, "positive": True, "features": "hedgehog"}, [1, 1, 1]),
        ({"window": 7, "filters": 4, **GROUPED}, [1, 1, 1]),
        ({"window": 7, "filters": 6, "share_state": False, "sliding_windows": [3, 0, 0], **GROUPED}, [1, 1, 1]),
    ],
    ids=str,
)
def test_students_on_a_gpu(changes, calls, monkeypatch):
    """Loss and gradients as without a GPU; where there is padding, or a cache, windows are torch's attention."""
    model = tiny_student(**{"modal": False} | changes)
    ids, found, counts = torch.randint(1, 97, (2, 29)), [], []
    plain = curve(model, ids, use_cache=False)
    as_on_a_gpu(monkeypatch, in_torch(found))
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *_: counts.append(len(found)))
    for one, other in zip(plain, curve(model, ids, use_cache=False), strict=True):
        assert_close(one, other, 1e-13)
    assert [after - before for before, after in zip([0, *counts], counts, strict=False)] == calls
    padded = torch.ones_like(ids)
    padded[0, :3] = 0
    with torch.no_grad():
        model(input_ids=ids, attention_mask=padded, use_cache=False)
        model(input_ids=ids, use_cache=True)
    assert len(found) == sum(calls)


def test_a_student_on_a_gpu_under_autocast(monkeypatch):
    """Where norms and angles are wider than projections, kernels get tensors of one dtype."""
    model, ids, found = tiny_student(window=7, **KEPT).float(), torch.randint(1, 97, (2, 29)), []
    with torch.autocast("cpu", torch.bfloat16):
        plain = curve(model, ids, use_cache=False)
        as_on_a_gpu(monkeypatch, in_torch(found))
        for one, other in zip(plain, curve(model, ids, use_cache=False), strict=True):
            assert_close(one, other, 0.2)  # measured 5e-2 in the gradient of one bias, rounded to bfloat16
    assert len(found) == 5


def test_a_students_kernels(monkeypatch, device):
    """A layer with heads of both kinds, whose projections they read and write as they lie in memory."""
    model = tiny_student(num_hidden_layers=1, window=5, attention_heads=[[1]], attention_window=11).to(device)
    ids = torch.randint(1, 97, (1, 20)).to(device)
    plain = curve(model, ids, use_cache=False)
    if device.type == "cpu":
        as_on_a_gpu(monkeypatch, near_and_far)
    kernels = watched(monkeypatch, window_triton, KERNELS)
    for one, other in zip(plain, curve(model.float(), ids, use_cache=False), strict=True):
        assert_close(one, other.double(), 2e-5)
    assert [len(kernel.launches) for kernel in kernels] == [2] * 3


@pytest.mark.slow
def test_the_kernels_compile_without_a_gpu():
    """Into machine code that shares no more memory than any multiprocessor has."""
    sizes = toeplitz_triton.sizes_for(torch.zeros(16, dtype=torch.bfloat16), torch.zeros(16)) | {"BLOCK": 64}
    constants = {name: sizes.pop(name) for name in ("BLOCK", "N", "PRECISION")}
    constants["LOG2_E"] = window_triton.LOG2_E
    del sizes["M"]
    matrices = dict.fromkeys(["q", "k", "v", "gates", "dy", "dgates", "y", "near_part", "far_part", "to_far"], "*bf16")
    matrices |= dict.fromkeys(["dq", "dk", "dv"], "*bf16") | dict.fromkeys(["taps", "masses", "dots"], "*fp32")
    kernels = []
    for name in KERNELS:
        names = getattr(window_triton, name).arg_names
        types = {each: kind for each, kind in matrices.items() if each in names} | {"scale": "fp32"}
        kernels += [(name, types, constants | {"FAR": far}, sizes) for far in (True, False)]
    shared = compiled(window_triton, kernels, 90)
    assert max(shared) <= 99 * 2**10, shared


def test_launches_of_a_layer(monkeypatch):
    """Of a layer of a training on a GPU, not compiled: mixer with its filter, norms, MLP."""
    as_on_a_gpu(monkeypatch, near_and_far)
    kernels = watched(monkeypatch, window_triton, KERNELS, runs=False)
    lags = watched(monkeypatch, toeplitz_triton, ["_lags"], runs=False)
    taps_gradient, inside, counts = window_triton.taps_gradient, [], []

    def counted(*given):  # modes of torch do not see what an operator does
        with Launches() as found:
            dtaps = taps_gradient(*given)
        inside.extend(found.launched)
        return dtaps

    monkeypatch.setattr(window_triton, "taps_gradient", counted)
    for layers in (1, 1, 2):  # the first makes what later ones keep
        model, ids = tiny_student(num_hidden_layers=layers, window=7).float(), torch.randint(1, 97, (1, 29))
        inside.clear()
        for kernel in (*kernels, *lags):
            kernel.launches.clear()
        with Launches() as forward:
            loss = model(input_ids=ids, use_cache=False).logits.sum()
        with Launches() as backward:
            loss.backward()
        operators = sum(name.startswith("near_and_far") for name in backward.launched)
        launched = sum(len(kernel.launches) for kernel in (*kernels[1:], *lags))
        counts.append((len(forward.launched), len(backward.launched) - operators + launched + len(inside)))
    (*one,), (*two,) = counts[1:]
    assert two[0] - one[0] <= 35 and two[1] - one[1] <= 86, (one, two)
