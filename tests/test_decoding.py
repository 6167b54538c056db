"""A recurrent student is one model in all its forms: the recurrence token by token is the definition."""

import copy

import numpy as np
import pytest
import reference
import torch
from conftest import GROUPED_SHAPES, Graphs, normal, random_ids, tiny_student
from reference import assert_close, relative_error

from scavenger.model import HyenaCache
from scavenger.model.decoding import Decoder
from scavenger.model.filters import ModalFilter
from scavenger.model.hyena import HyenaMixer, long_convolution
from scavenger.model.modal import ChannelState, HeadState, modal_scan


F64 = torch.float64  # whole models: measured 6e-15 at most, where the tolerance is 5e-14
SHAPES = [
    {"filters": 30},
    {"filters": 5},
    {"filters": 3},  # groups of 10 channels, in 5 slices
    {"filters": 30, "hyena_order": 2},
    {"filters": 5, "attention_layers": [1], "attention_window": 7},
    *GROUPED_SHAPES,
]
COMPILED = [
    {"filters": 5, "state_sizes": [[2, 1, 2, 4, 1], [4, 2, 2, 1, 4]]},  # three sizes in each layer
    {"filters": 30},
    {"filters": 30, "hyena_order": 2},
    {"filters": 5, "attention_layers": [1], "attention_window": 7},
    {**GROUPED_SHAPES[1], "attention_layers": [1], "attention_window": 7},
]
LENGTH = 41


@pytest.mark.parametrize("length", [1, 2, 7, 63, 64, 65, 150])
@pytest.mark.parametrize("width", [1, 4, 6, 9, 11])
def test_a_piece_is_the_recurrence(width, length, device):
    filter, modes, q, k, v = _inputs(width, length, device)
    state, start = _some_state(modes, width)
    twin = copy.deepcopy(state)
    expected, final = _recurrence(filter, q, k, v, start)
    y = long_convolution(q, k, v, filter(length)) + state.read(q)
    state.advance(k, v)
    assert_close(expected, y, 2e-14)  # measured 1.4e-15 at most
    assert_close(final, _complex(modes, state), 2e-14)
    if width > 1:
        assert_close(expected, modal_scan(q, k, v, filter(length), twin, long_convolution), 2e-14)
        assert_close(final, _complex(modes, twin), 2e-14)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("width", [1, 4, 6, 9, 11])
def test_steps_are_the_recurrence(width, in_place, device):
    """In place and not."""
    filter, modes, q, k, v = _inputs(width, 23, device)
    state, start = _some_state(modes, width)
    expected, _ = _recurrence(filter, q, k, v, start)
    before = state.state
    with torch.set_grad_enabled(not in_place):
        for t in range(23):
            here = slice(t, t + 1)
            assert_close(expected[:, :, :, t], state.step(q[:, :, :, t], k[:, :, here], v[:, :, here]), 2e-14)
            _, final = _recurrence(filter, q[:, :, :, : t + 1], k[:, :, : t + 1], v[:, :, : t + 1], start)
            assert_close(final, _complex(modes, state), 2e-14)
    assert in_place == (before is state.state)


def test_a_state_that_is_not_advanced_and_an_output_of_zero_are_found(device):
    filter, modes, q, k, v = _inputs(6, 23, device)
    state, start = _some_state(modes, 6)
    expected, final = _recurrence(filter, q, k, v, start)
    assert relative_error(expected, torch.zeros_like(expected)) > 0.5
    assert relative_error(final, _complex(modes, state)) > 0.5
    assert relative_error(expected, long_convolution(q, k, v, filter(23))) > 0.1  # without what came before


@pytest.mark.parametrize("pieces", [[31], [12, 1, 1, 17], [1] * 10])
@pytest.mark.parametrize("width", [1, 6])
def test_gradients_of_outputs_and_of_the_final_state(width, pieces, device):
    filter, _, q, k, v = _inputs(width, sum(pieces), device)
    modes = filter.requires_grad_().modes()
    state, _ = _some_state(modes, width)
    state.state.requires_grad_()
    start = _complex(modes, state)
    weight, state_weight = normal(*q.shape, device=device), normal(*start.shape, device=device)
    variables = [*(x.requires_grad_() for x in (q, k, v)), state.state, *filter.parameters()]

    def gradients(y, final):
        loss = (y * weight).sum() + (final * state_weight).real.sum()
        return torch.autograd.grad(loss, variables, retain_graph=True)

    slow = gradients(*_recurrence(filter, q, k, v, start))
    found = []
    for a, b, c in zip(*(x.split(pieces, -2) for x in (q, k, v)), strict=True):
        if b.shape[2] == 1:
            found.append(state.step(a[:, :, :, 0], b, c)[:, :, :, None])
        else:
            found.append(long_convolution(a, b, c, filter(b.shape[2])) + state.read(a))
            state.advance(b, c)
    for expected, gradient in zip(slow, gradients(torch.cat(found, dim=3), _complex(modes, state)), strict=True):
        assert_close(expected, gradient, 1e-14)  # measured 1e-15 at most


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [0, 1, 2, 3, 17, LENGTH - 1])
def test_whole_pass_is_prompt_and_steps_is_pure_recurrence(shape, prompt, monkeypatch, device):
    model = tiny_student(modal=True, **shape).to(device)
    ids = random_ids(2, LENGTH, device=device)
    whole = model(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        assert_close(whole, _prompt_and_steps(model, ids, prompt), 5e-14)
        if prompt == 1:
            monkeypatch.setattr("scavenger.model.step.available", lambda: False)
            monkeypatch.setattr("scavenger.model.hyena.ChannelState", _loop_state)
            monkeypatch.setattr("scavenger.model.hyena.HeadState", _loop_state)
            assert_close(whole, _prompt_and_steps(model, ids, prompt), 5e-14)
    for length in (1, 2, 5, 17, LENGTH):
        assert_close(whole[:, :length], model(input_ids=ids[:, :length], use_cache=False).logits, 5e-14)


# Measured 1e-6, 4e-3 and 4e-2 at most.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.float16, 2e-2), (torch.bfloat16, 0.15)])
@pytest.mark.parametrize("shape", SHAPES)
def test_each_dtype_by_its_own_rounding(shape, dtype, tolerance, device):
    model = tiny_student(modal=True, **shape).float().to(device).to(dtype)
    ids = random_ids(2, LENGTH, device=device)
    exact = tiny_student(modal=True, **shape).to(device)(input_ids=ids, use_cache=False).logits
    with torch.no_grad():
        assert_close(exact, _prompt_and_steps(model, ids, 17).double(), tolerance)


@pytest.mark.parametrize("shape", SHAPES)
def test_states_are_copied_and_reordered(shape, device):
    model = tiny_student(modal=True, **shape).to(device)
    ids = random_ids(3, LENGTH, device=device)
    order = torch.tensor([2, 0, 0, 1], device=device)
    with torch.no_grad():
        whole = model(input_ids=ids[order], use_cache=False).logits
        cache = model(input_ids=ids[:, :9], use_cache=True).cache
        for t in range(9, 14):
            model(input_ids=ids[:, t : t + 1], cache=cache)
        twin = copy.deepcopy(cache)
        twin.reorder_cache(order)
        for t in range(14, LENGTH):
            out = model(input_ids=ids[order, t : t + 1], cache=twin)
            assert_close(whole[:, t : t + 1], out.logits, 5e-14)
        rest = model(input_ids=ids[order, 14:], cache=_reordered(cache, order))
    assert_close(whole[:, 14:], rest.logits, 5e-14)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("prompt", [1, 17])
def test_states_made_in_inference_mode_are_stepped_outside_it(shape, prompt, device):
    model = tiny_student(modal=True, **shape).to(device)
    ids, rows = random_ids(2, LENGTH, device=device), torch.tensor([1, 0, 1], device=device)
    with torch.inference_mode():
        cache = model(input_ids=ids[:, :prompt], use_cache=True).cache
        model(input_ids=ids[:, prompt : prompt + 1], cache=cache)
    selected = copy.deepcopy(cache)
    with torch.inference_mode():
        selected.reorder_cache(rows)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        for t in range(prompt + 1, prompt + 6):
            step = slice(t, t + 1)
            assert_close(whole[:, step], model(input_ids=ids[:, step], cache=cache).logits, 5e-14)
            assert_close(whole[rows, step], model(input_ids=ids[rows, step], cache=selected).logits, 5e-14)


@pytest.mark.parametrize("shape", SHAPES)
def test_states_that_gradients_flow_through_are_not_overwritten(shape, device):
    """Steps without gradients keep what a backward pass of earlier steps needs, and their states have no gradient."""
    model = tiny_student(modal=True, **shape).to(device)
    ids = random_ids(2, LENGTH, device=device)
    whole = model(input_ids=ids, use_cache=False).logits
    prompt = model(input_ids=ids[:, :17], use_cache=True)
    step = model(input_ids=ids[:, 17:18], cache=prompt.cache)
    with torch.no_grad():
        for t in range(18, 22):
            out = model(input_ids=ids[:, t : t + 1], cache=prompt.cache)
            assert_close(whole[:, t : t + 1], out.logits, 5e-14)
    assert not any(state.requires_grad for layer in prompt.cache.layers for state in layer.states)
    found = torch.autograd.grad(torch.cat([prompt.logits, step.logits], dim=1).square().sum(), list(model.parameters()))
    expected = torch.autograd.grad(whole[:, :18].square().sum(), list(model.parameters()))
    for a, b in zip(expected, found, strict=True):
        assert_close(a, b, 1e-10)


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_that_come_and_go_are_each_sequence_alone(shape, device):
    model = tiny_student(modal=True, **shape).to(device)
    texts = [random_ids(LENGTH, device=device) for _ in range(4)]
    whole = [model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    decoder = Decoder(model, rows=3)
    rows, read = {}, {}
    # (before which step) text and how much of it is its prompt; text 1 leaves, and text 3 takes its row
    coming = {0: [(0, 9), (1, 2)], 3: [(2, 17)], 11: [(3, 1)]}
    for step in range(24):
        if step == 11:
            decoder.remove([rows.pop(1)])
        new = coming.get(step, [])
        for (text, prompt), row in zip(new, decoder.add([texts[t][:n] for t, n in new]), strict=True):
            rows[text], read[text] = row, prompt
        assert len(set(rows.values())) == len(rows)
        tokens = random_ids(3, device=device)  # what idle rows read
        for text, row in rows.items():
            assert_close(whole[text][read[text] - 1], decoder.logits[row], 5e-14)
            tokens[row] = texts[text][read[text]]
            read[text] += 1
        assert decoder.step(tokens) is decoder.logits
    assert read[3] == 14 and read[0] == 33


@pytest.mark.parametrize("shape", SHAPES)
def test_prompts_in_pieces_between_steps(shape, device):
    """Of several lengths, in pieces shorter than any; closed before its end, a prompt takes no row."""
    model = tiny_student(modal=True, **shape).to(device)
    texts = [random_ids(LENGTH, device=device) for _ in range(3)]
    whole = [model(input_ids=text[None], use_cache=False).logits[0] for text in texts]
    decoder = Decoder(model, rows=3)
    (first,) = decoder.add([texts[0][:9]])
    abandoned = decoder.adding([texts[1]], 5)
    assert next(abandoned) is None and len(decoder.free) == 1
    abandoned.close()
    assert len(decoder.free) == 2
    place, rows = 9, None
    for rows in decoder.adding([texts[1][:33], texts[2][:21]], 6):
        assert_close(whole[0][place - 1], decoder.logits[first], 5e-14)
        if rows is None:
            tokens = random_ids(3, device=device)
            tokens[first] = texts[0][place]
            decoder.step(tokens)
            place += 1
    assert place == 9 + 4 + 6 and not decoder.free  # the shorter prompt, by itself, and the longer
    for text, row, length in zip(texts[1:], rows, (33, 21), strict=True):
        assert_close(whole[1 if text is texts[1] else 2][length - 1], decoder.logits[row], 5e-14)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES[::2])
def test_generated_tokens_are_those_of_transformers(shape, device):
    model = tiny_student(modal=True, **shape).to(device)
    prompts = [random_ids(n, low=1, device=device) for n in (5, 1, 12, 3, 8, 2, 2)]
    alone = [
        model.generate(prompt[None], max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)[
            0, len(prompt) :
        ]
        for prompt in prompts
    ]
    end = alone[0][4].item()
    expected = [x[: x.tolist().index(end) + 1] if end in x else x for x in alone]
    assert len({len(x) for x in expected}) > 1
    decoder = Decoder(model, rows=3)
    ends = (end, [98, end], (end,), torch.tensor([98, end]), np.array([98, end]), np.int64(end), "own")
    for eos_token_id, wanted in ((None, alone), ([], alone), *((each, expected) for each in ends)):
        model.generation_config.eos_token_id = [97, end]
        decoder = model.batch_decoder(rows=3)
        found = decoder.generate(prompts, 9, eos_token_id)
        assert [x.tolist() for x in found] == [x.tolist() for x in wanted]
    assert [x.tolist() for x in decoder.generate(prompts, 9)] == [x.tolist() for x in expected]
    with pytest.raises(ValueError, match="eos_token_id is 'ownn'; expected 'own', None, a token or several"):
        decoder.generate(prompts, 9, "ownn")
    model.generation_config.eos_token_id = None
    decoder = model.batch_decoder(rows=3)
    assert sorted(decoder.free) == [0, 1, 2] and decoder.generate([], 9) == []
    sharp = decoder.generate(prompts, 9, do_sample=True, temperature=1e-9)
    assert [x.tolist() for x in sharp] == [x.tolist() for x in alone]
    torch.manual_seed(0)
    first, second = (decoder.generate(prompts[:1], 1, do_sample=True, top_k=5, top_p=0.9) for _ in range(2))
    best = model(input_ids=prompts[0][None]).logits[0, -1].topk(5).indices.cpu()
    assert first[0] in best and second[0] in best


@pytest.mark.parametrize("shape", SHAPES)
def test_a_long_prompt_does_not_lengthen_the_short_ones(shape, device):
    """Each is read as if alone, and padding at most doubles the tokens that are read."""
    model = tiny_student(modal=True, **shape).to(device)
    lengths = [3, 400, 1, 33, 32, 2, 70, 5, 64, 65]
    prompts = [random_ids(n, device=device) for n in lengths]
    decoder, read = Decoder(model, rows=len(prompts)), []
    decoder.model.model.embed.register_forward_hook(lambda module, args, output: read.append(args[0].numel()))
    rows = decoder.add(prompts)
    assert sum(lengths) <= sum(read) < 2 * (sum(lengths) + 32 * len(prompts)) < 400 * len(prompts)
    tokens = random_ids(len(prompts), device=device)
    logits = [decoder.logits, decoder.step(tokens)]
    with torch.no_grad():
        for prompt, row in zip(prompts, rows, strict=True):
            alone = model(torch.cat([prompt, tokens[row : row + 1]])[None]).logits[0, -2:]
            assert_close(alone, torch.stack([each[row] for each in logits]), 5e-14)


@pytest.mark.parametrize("shape", SHAPES[::3])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_rows_are_free_after_an_exception(shape, error, device, monkeypatch):
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    model = tiny_student(modal=True, **shape).to(device)
    prompts = [random_ids(n, device=device) for n in (5, 9, 2)]
    decoder, calls = Decoder(model, rows=2), []
    expected = decoder.generate(prompts, 30, None)

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 4:
            raise error

    # Between the layers of a step: some have advanced, some have not.
    hook = decoder.model.model.layers[-1].register_forward_pre_hook(interrupted)
    with pytest.raises(error):
        decoder.generate(prompts, 30, None)
    hook.remove()
    assert sorted(decoder.free) == [0, 1]
    with pytest.raises(ValueError, match="prompt 1 has shape"):
        decoder.generate([prompts[0], prompts[0][:0]], 30, None)
    again = decoder.generate(prompts, 30, None)
    assert [x.tolist() for x in again] == [x.tolist() for x in expected]


@pytest.mark.parametrize("filters", [5, 3])
def test_a_step_interrupted_in_the_middle_of_a_state(filters, monkeypatch):
    """The first layer has read a token that the others have not."""
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    model = tiny_student(filters, modal=True)
    prompts = [random_ids(n, device="cpu") for n in (5, 9)]
    decoder = Decoder(model, rows=3)
    expected = decoder.generate(prompts, 30, None)
    read = HyenaMixer.forward

    def torn(self, *args):
        if args[0].shape[1] == 1 and self.layer_index == 1:
            raise KeyboardInterrupt
        return read(self, *args)

    for _ in range(5):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(HyenaMixer, "forward", torn)
            decoder.generate(prompts, 30, None)
    again = decoder.generate(prompts, 30, None)
    assert [x.tolist() for x in again] == [x.tolist() for x in expected]


@pytest.mark.parametrize("shape", [{}, {"qkv_bias": False, "window": 7}])
def test_packed_layers_are_the_layers(shape, device, monkeypatch):
    """The mixer's projections are one product, which takes biases and their absence as they are."""
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    monkeypatch.setattr("scavenger.model.decoding.PACKING_PAYS", 0)
    model = tiny_student(5, modal=True, **shape).float().to(device)
    ids = random_ids(2, LENGTH, device=device)
    whole = model(input_ids=ids, use_cache=False).logits
    decoder = Decoder(model, rows=2)
    assert decoder.model is not model and type(model.lm_head) is torch.nn.Linear
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        mixer = decoder.model.model.layers[0].mixer
        for layer in (decoder.model.lm_head, mixer.projected_at_once, mixer.out):
            assert type(layer).__name__ == "PackedLinear"
    decoder.add(list(ids[:, :9]))
    for t in range(9, 20):
        assert_close(whole[:, t], decoder.step(ids[:, t]), 2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("in_torch", [False, True])
@pytest.mark.parametrize("shape", COMPILED)
def test_a_step_compiles_to_one_graph(shape, in_torch, monkeypatch, device):
    """Its logits are the eager ones while rows join and leave, and nothing is compiled a second time."""
    monkeypatch.setattr("scavenger.model.token_cpp.WORK", 0)
    if in_torch:
        monkeypatch.setattr("scavenger.model.step.available", lambda: False)
    graphs = Graphs()
    torch._dynamo.reset()
    model = tiny_student(modal=True, num_hidden_layers=2, **shape).to(device)
    prompts = [random_ids(n, device=device) for n in (9, 2, 14)]
    compiled, eager = (Decoder(model, rows=3) for _ in range(2))
    compiled._advance = torch.compile(compiled._advance, backend=graphs, dynamic=False, fullgraph=True)
    for step in range(12):
        for decoder in (compiled, eager):
            if step in (0, 4):
                decoder.add(prompts[:2] if step == 0 else prompts[2:])
            elif step == 7:
                decoder.remove([1])
                decoder.add([prompts[0][:1]])
        tokens = random_ids(3, device=device)
        assert_close(eager.step(tokens), compiled.step(tokens), 5e-14)
    assert graphs.count == 1


def test_what_a_decoder_refuses():
    model = tiny_student(5, modal=True)
    for wrong, rows, message in (
        (tiny_student(), 2, "filter is 'implicit'; expected 'modal'"),
        (tiny_student(modal=True, attention_layers=[1], attention_window=0), 2, "state grows; expected a window"),
        (model, 0, "rows is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            Decoder(wrong, rows)
    decoder = Decoder(model, rows=2)
    word = torch.tensor([3, 4])
    for call, message in (
        (lambda: decoder.add([word] * 3), "3 prompts for 2 free rows of 2"),
        (lambda: decoder.add([word, word[:0]]), r"prompt 1 has shape \(0,\)"),
        (lambda: decoder.step(torch.tensor([1])), r"shape \(1,\); expected \(2,\)"),
        (lambda: decoder.remove([0]), "row 0 holds no sequence"),
        (lambda: decoder.generate([word], 0), "max_new_tokens is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert decoder.add([word]) == [0] and decoder.add([]) == []
    with pytest.raises(ValueError, match="1 rows hold sequences"):
        decoder.generate([word], 3)


def _inputs(width, length, device):
    """A filter of each state size from 0 to 3, two of size 2, one of its poles slow; and q of three queries, k, v."""
    filter = ModalFilter([2, 0, 3, 1, 2]).double().requires_grad_(False)
    with torch.no_grad():
        radius = 0.3 + 0.69 * torch.rand(8, dtype=F64)
        radius[3] = 0.9995
        filter.pole.copy_(torch.view_as_real(torch.polar(radius, 3 * torch.rand(8, dtype=F64))))
        filter.residue.normal_()
        filter.direct.normal_()
    filter.to(device)
    q = normal(2, 5, 3, length, width, device=device)
    return filter, filter.modes(), q, *normal(2, 2, 5, length, width, device=device)


def _some_state(modes, width):
    """A state that holds something, and the same as (batch, mode, width, width) complex."""
    state = ChannelState(modes, 2) if width == 1 else HeadState(modes, 2, width)
    state.state = normal(*state.state.shape, device=state.state.device)
    return state, _complex(modes, state)


def _complex(modes, state):
    parts = []
    for part in state.parts:
        if isinstance(state, HeadState):  # (batch, filter, mode, 2, row, width)
            part = part.movedim(3, -1).flatten(1, 2)
        else:  # (batch, 2, filter, mode)
            part = part.movedim(1, -1).flatten(1, 2)[:, :, None, None]
        parts.append(torch.view_as_complex(part.contiguous()))
    return torch.cat(parts, dim=1)[:, modes.layout.modes.argsort()]


def _recurrence(filter, q, k, v, start):
    mode_filter = [index for index, size in enumerate(filter.state_sizes) for _ in range(size)]
    mode_filter = torch.tensor(mode_filter, device=filter.pole.device)
    return _of_queries(q, k, v, filter.poles, filter.residues, mode_filter, filter.direct, start)


def _of_queries(q, *others):
    """The outputs of the recurrence for each query, and the final state, which is the same for all of them."""
    outputs, states = zip(*(reference.recurrence(query, *others) for query in q.unbind(2)), strict=True)
    assert all(torch.equal(states[0], state) for state in states)
    return torch.stack(outputs, dim=2), states[0]


def _loop_state(modes, batch, width=1, value_width=1):
    """A state that knows nothing but the recurrence's definition."""
    assert value_width == width
    return _Loop(modes, modes.poles.new_zeros(batch, len(modes.poles), width, width))


class _Loop:
    def __init__(self, modes, state):
        back = modes.layout.back
        sizes = torch.tensor([size for count, size in modes.layout.buckets for _ in range(count)], device=back.device)
        sizes = sizes[back]
        self.modes, self.state = modes, state
        self.mode_filter = torch.arange(len(sizes), device=back.device).repeat_interleave(sizes)

    def step(self, q, k, v):
        poles, residues, direct, *_ = self.modes
        y, self.state = _of_queries(q[:, :, :, None], k, v, poles, residues, self.mode_filter, direct, self.state)
        return y[:, :, :, 0]


def _prompt_and_steps(model, ids, prompt):
    cache = HyenaCache(model.config)
    pieces = ids.split([prompt] + [1] * (ids.shape[1] - prompt), dim=1)
    return torch.cat([model(input_ids=piece, cache=cache).logits for piece in pieces], dim=1)


def _reordered(cache, order):
    cache.reorder_cache(order)
    return cache
