"""The student is one model in each of its forms: whole sequence, prompt and steps, any split."""

import pytest
import reference
import torch
from conftest import tiny_student
from reference import assert_close
from transformers import DynamicCache

from scavenger.model import HyenaCache
from scavenger.model.convolution import causal_convolution, short_convolution, toeplitz_block
from scavenger.model.filters import ImplicitFilter, ModalFilter
from scavenger.model.modal import modal_scan, modal_step, modal_taps


F64 = torch.float64


def test_fft_convolution_and_its_gradients():
    u = torch.randn(2, 3, 63, dtype=F64, requires_grad=True)
    taps = torch.randn(3, 63, dtype=F64, requires_grad=True)
    weight = torch.randn(2, 3, 63, dtype=F64)
    fast, slow = causal_convolution(u, taps), reference.convolution(u, taps)
    assert_close(slow, fast, 1e-14)  # measured 3e-16
    for a, b in zip(
        torch.autograd.grad((slow * weight).sum(), (u, taps)),
        torch.autograd.grad((fast * weight).sum(), (u, taps)),
        strict=True,
    ):
        assert_close(a, b, 1e-14)
    assert_close(slow.float(), causal_convolution(u.float(), taps.float()), 5e-6)


def test_fft_convolution_with_taps_longer_than_the_input_does_not_wrap():
    u, taps = torch.randn(2, 3, 63, dtype=F64), torch.randn(3, 101, dtype=F64)
    whole = causal_convolution(u, taps)
    for length in (1, 2, 3, 17):
        assert_close(whole[..., :length], causal_convolution(u[..., :length], taps), 1e-13)


@pytest.mark.parametrize("split", [[63], [1] * 63, [0, 1, 2, 60], [5, 0, 58]])
def test_short_convolution_in_pieces(split):
    x, weight = torch.randn(2, 63, 7, dtype=F64), torch.randn(7, 3, dtype=F64)
    whole = reference.convolution(x.transpose(1, 2), torch.nn.functional.pad(weight.flip(1), (0, 60))).transpose(1, 2)
    state, pieces = None, []
    for piece in x.split(split, dim=1):
        y, state = short_convolution(piece, weight, state)
        pieces.append(y)
    assert_close(whole, torch.cat(pieces, dim=1), 1e-14)
    assert torch.equal(state, x[:, -2:])


def test_toeplitz_block_is_the_matrix_of_the_filter():
    taps = torch.randn(3, 11, dtype=F64)
    block = toeplitz_block(taps, range(4, 9))
    for row, t in enumerate(range(4, 9)):
        for s in range(9):
            expected = taps[:, t - s] if s <= t else torch.zeros(3, dtype=F64)
            assert torch.equal(block[:, row, s], expected)


def test_modal_taps_are_the_loop_of_multiplications():
    poles, residues, mode_filter = _modes()
    taps = modal_taps(poles, residues, mode_filter, 3, 203)
    power = torch.ones_like(poles)
    for t in range(203):
        expected = torch.zeros(3, dtype=F64).index_add(0, mode_filter, (residues * power).real)
        torch.testing.assert_close(taps[:, t], expected, rtol=1e-11, atol=1e-12)
        power = power * poles


@pytest.mark.parametrize("width", [1, 4])
@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65, 150])
def test_modal_scan_is_the_recurrence(width, length):
    poles, residues, mode_filter = _modes()
    q, k, v = torch.randn(3, 2, 3, length, width, dtype=F64)
    direct, state = torch.randn(3, dtype=F64), torch.randn(2, 5, width, width, dtype=torch.complex128)
    taps = modal_taps(poles, residues, mode_filter, 3, max(1, min(64, length)))
    taps[:, 0] += direct
    y, final = modal_scan(q, k, v, taps, poles, residues, mode_filter, state)
    if length == 1:
        step, stepped = modal_step(q[:, :, 0], k[:, :, 0], v[:, :, 0], direct, poles, residues, mode_filter, state)
        assert_close(y[:, :, 0], step, 1e-13)
        assert_close(final, stepped, 1e-13)
    if length:
        expected, expected_state = reference.recurrence(q, k, v, poles, residues, mode_filter, direct, state)
        assert_close(expected, y, 1e-13)  # measured 8e-15
        assert_close(expected_state, final, 1e-13)
    else:
        assert y.shape == v.shape and torch.equal(state, final)


@pytest.mark.parametrize("filters", [5, 30])
def test_mixer_is_its_formula_with_gradients(filters):
    mixer = tiny_student(filters).gpt_neox.layers[1].mixer
    q, k, v = (torch.randn(2, filters, 63, 30 // filters, dtype=F64, requires_grad=True) for _ in range(3))
    taps = mixer.filter(63)
    weight = torch.randn_like(v)
    fast, slow = mixer._parallel(q, k, v), reference.mixer(q, k, v, taps)
    assert_close(slow, fast, 1e-13)
    variables = (q, k, v, *mixer.filter.parameters())
    for a, b in zip(
        torch.autograd.grad((slow * weight).sum(), variables, retain_graph=True),
        torch.autograd.grad((fast * weight).sum(), variables),
        strict=True,
    ):
        assert_close(a, b, 1e-11)


def test_long_inputs_are_read_in_blocks(monkeypatch):
    mixer = tiny_student(5).gpt_neox.layers[0].mixer
    q, k, v = torch.randn(3, 2, 5, 63, 6, dtype=F64)
    whole = mixer._parallel(q, k, v)
    monkeypatch.setattr("scavenger.model.hyena.BLOCK", 17)
    assert_close(whole, mixer._parallel(q, k, v), 1e-13)


def test_first_tap_holds_the_direct_term_and_the_window_decays():
    implicit = ImplicitFilter(3, 11, 9, 14.0, 63).double()
    before = implicit(150)
    with torch.no_grad():
        implicit.direct += torch.tensor([1.0, 2.0, 3.0])
    difference = implicit(150) - before
    torch.testing.assert_close(difference[:, 0], torch.tensor([1.0, 2.0, 3.0], dtype=F64))
    assert difference[:, 1:].abs().max() == 0
    assert before[:, 120:].abs().max() < 0.05 * before[:, :20].abs().max()
    assert_close(before[:, :40], implicit(40) - difference[:, :40], 1e-14)  # a prefix, not a rescaled filter


@pytest.mark.parametrize("filters", [5, 30])
@pytest.mark.parametrize("modal", [False, True])
def test_the_future_does_not_leak(filters, modal):
    model = tiny_student(filters, modal)
    ids = torch.randint(0, 97, (2, 63))
    changed = ids.clone()
    changed[:, 40:] = torch.randint(0, 97, (2, 23))
    before, after = (model(input_ids=x, use_cache=False).logits for x in (ids, changed))
    assert_close(before[:, :40], after[:, :40], 1e-13)
    assert (before[:, 40:] - after[:, 40:]).abs().max() > 1e-3


@pytest.mark.parametrize("attention_layers", [[], [0, 2]])
@pytest.mark.parametrize("filters", [5, 30])
@pytest.mark.parametrize("split", [[63], [1] * 63, [1, 62], [2, 1, 60], [40] + [1] * 23, [7, 30, 26]])
def test_prompt_and_steps_give_the_whole_sequence(filters, split, attention_layers):
    model = tiny_student(filters, modal=True, attention_layers=attention_layers, attention_window=7)
    ids = torch.randint(0, 97, (2, 63))
    whole = model(input_ids=ids, use_cache=False).logits
    cache, pieces = None, []
    for piece in ids.split(split, dim=1):
        out = model(input_ids=piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        pieces.append(out.logits)
    assert_close(whole, torch.cat(pieces, dim=1), 1e-11)
    full = model(input_ids=ids, use_cache=True).past_key_values
    for a, b in zip(full.layers, cache.layers, strict=True):
        for mine, other in zip(a.states, b.states, strict=True):
            assert_close(mine.to(torch.complex128), other.to(torch.complex128), 1e-11)


@pytest.mark.parametrize("attention_layers", [[], [1]])
@pytest.mark.parametrize("filters", [5, 30])
def test_left_padding_changes_nothing(filters, attention_layers):
    model = tiny_student(filters, modal=True, attention_layers=attention_layers, attention_window=7)
    ids = torch.randint(1, 97, (1, 20))
    padded = torch.cat([torch.zeros(1, 9, dtype=torch.long), ids], dim=1)
    mask = torch.cat([torch.zeros(1, 9), torch.ones(1, 20)], dim=1).long()
    alone = model(input_ids=ids, use_cache=False).logits
    assert_close(alone, model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 9:], 1e-11)
    first = model(input_ids=padded[:, :25], attention_mask=mask[:, :25], use_cache=True)
    second = model(input_ids=padded[:, 25:], attention_mask=mask, past_key_values=first.past_key_values, use_cache=True)
    assert_close(alone[:, 16:], second.logits, 1e-11)


@pytest.mark.parametrize("attention_layers", [[], [1]])
def test_right_padding_changes_nothing_without_a_cache(attention_layers):
    model = tiny_student(modal=True, attention_layers=attention_layers, attention_window=7)
    ids = torch.randint(1, 97, (1, 20))
    padded = torch.cat([ids, torch.zeros(1, 9, dtype=torch.long)], dim=1)
    mask = torch.cat([torch.ones(1, 20), torch.zeros(1, 9)], dim=1).long()
    alone = model(input_ids=ids, use_cache=False).logits
    assert_close(alone, model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, :20], 1e-11)
    with pytest.raises(ValueError, match="pads on the right"):
        model(input_ids=padded, attention_mask=mask, use_cache=True)


def test_caches_that_do_not_fit_are_refused():
    ids = torch.randint(1, 97, (1, 5))
    cache = tiny_student(modal=True)(input_ids=ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="has no state"):
        tiny_student()(input_ids=ids, past_key_values=cache)
    other = DynamicCache()
    other.update(torch.zeros(1, 5, 3, 6), torch.zeros(1, 5, 3, 6), 0)
    with pytest.raises(ValueError, match="DynamicCache; expected a HyenaCache"):
        tiny_student(modal=True)(input_ids=ids, past_key_values=other)


def test_state_size_does_not_depend_on_the_length():
    model = tiny_student(modal=True)
    sizes = [
        model(input_ids=torch.randint(0, 97, (2, n)), use_cache=True).past_key_values.nbytes for n in (1, 5, 63, 200)
    ]
    assert len(set(sizes)) == 1
    modes = sum(sum(layer) for layer in model.config.state_sizes)
    assert sizes[0] == 2 * (16 * modes * 6 * 6 + 8 * 3 * 2 * 90)


def test_kept_attention_sees_its_window_and_no_more():
    layer = tiny_student(attention_layers=[1], attention_window=7).gpt_neox.layers[1].mixer
    hidden = torch.randn(2, 23, 30, dtype=F64)
    ones, zeros = torch.ones(2, 23, 2, dtype=F64), torch.zeros(2, 23, 2, dtype=F64)
    before = layer(hidden, ones, zeros)
    for t in (6, 7, 15):
        changed = hidden.clone()
        changed[:, t] += 1
        moved = (layer(changed, ones, zeros) - before).abs().amax((0, 2)) > 1e-9
        assert moved.tolist() == [t <= place < t + 7 for place in range(23)]
    full = HyenaCache(tiny_student(attention_layers=[1], attention_window=7).config)
    for piece in hidden.split([3, 1, 12, 7], dim=1):
        layer(piece, ones[:, : piece.shape[1]], zeros[:, : piece.shape[1]], None, full)
        assert full.layers[1].keys.shape[2] <= 6


def test_poles_stay_wide():
    model = tiny_student(modal=True).float()
    before = model.gpt_neox.layers[0].mixer.filter.pole.clone()
    for narrow in (torch.bfloat16, torch.float16):
        model.to(narrow)
        filter = model.gpt_neox.layers[0].mixer.filter
        assert filter.pole.dtype == filter.residue.dtype == torch.float32
        assert torch.equal(filter.pole, before)
        assert model.lm_head.weight.dtype == narrow


def test_modal_filter_gradients():
    filter = ModalFilter([2, 0, 3]).double()
    with torch.no_grad():
        filter.pole.uniform_(-0.6, 0.6)
        filter.residue.normal_()
    assert filter(9).shape == (3, 9)
    assert filter(9)[1].abs().max() == 0
    assert torch.autograd.gradcheck(
        lambda pole, residue: modal_taps(
            torch.view_as_complex(pole), torch.view_as_complex(residue), filter.mode_filter, 3, 9
        ),
        (filter.pole, filter.residue),
    )


def _modes():
    """Five modes, of filters 0, 0, 2, 1, 2, one of them slow."""
    radius = torch.tensor([0.9995, 0.5, 0.99, 0.9, 0.7], dtype=F64)
    poles = torch.polar(radius, torch.tensor([0.1, 2.0, 0.0, 3.0, 1.0], dtype=F64))
    return poles, torch.randn(5, dtype=torch.complex128), torch.tensor([0, 0, 2, 1, 2])
