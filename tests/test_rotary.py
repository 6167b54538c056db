"""Channels of q and k turn as in the teacher, in an order of their own."""

import pytest
import torch
from conftest import normal, tiny_student
from reference import assert_close

from scavenger.model import HyenaForCausalLM
from scavenger.model.rotary import Rotary, adjacent_pairs, turn


HEADS, WIDTH = 5, 11
TURNED = [0, 2, 6, 10]  # channels of a head


def angles(channels, device):
    angle = normal(2, 7, channels // 2, device=device)
    return angle.cos(), angle.sin()


def permuted(x, channels):
    """Heads (batch, length, head, channel) with the turned pairs side by side."""
    rows = adjacent_pairs(x.flatten(2).movedim(-1, 0), WIDTH, channels)
    return rows.movedim(0, -1).unflatten(-1, (HEADS, WIDTH))


@pytest.mark.parametrize("channels", TURNED)
@pytest.mark.parametrize("adjacent", [False, True])
def test_turning_pair_by_pair(adjacent, channels, device):
    x = normal(2, 7, HEADS, WIDTH, device=device).requires_grad_()
    cos, sin = angles(channels, device)
    expected = [x[..., channel] for channel in range(WIDTH)]
    for pair in range(channels // 2):
        first, second = (2 * pair, 2 * pair + 1) if adjacent else (pair, pair + channels // 2)
        a, b, c, s = x[..., first], x[..., second], cos[..., pair, None], sin[..., pair, None]
        expected[first], expected[second] = a * c - b * s, a * s + b * c
    slow, fast, weight = torch.stack(expected, dim=-1), turn(x, cos, sin, adjacent), normal(*x.shape, device=device)
    assert_close(slow, fast, 1e-15)
    gradients = (torch.autograd.grad((found * weight).sum(), x)[0] for found in (slow, fast))
    assert_close(*gradients, 1e-15)


@pytest.mark.parametrize("channels", TURNED)
def test_moving_pairs_and_turning_them_commute(channels, device):
    q, k = normal(2, 2, 7, HEADS, WIDTH, device=device)
    cos, sin = angles(channels, device)
    moved = [turn(permuted(z, channels), cos, sin, adjacent=True) for z in (q, k)]
    theirs = [turn(z, cos, sin, adjacent=False) for z in (q, k)]
    for ours, teacher in zip(moved, theirs, strict=True):
        assert torch.equal(ours, permuted(teacher, channels))
    products = [torch.einsum("bthc,bshc->bhts", *pair) for pair in (theirs, moved)]
    assert_close(*products, 2e-15)  # measured 1.3e-16
    if channels > 2:  # one pair is side by side in either order
        wrong = [turn(z, cos, sin, adjacent=True) for z in (q, k)]
        assert (torch.einsum("bthc,bshc->bhts", *wrong) - products[0]).abs().max() > 0.1


def test_rows_of_a_weight_and_of_a_bias_move_alike():
    weight, bias = torch.randn(HEADS * WIDTH, 3), torch.randn(HEADS * WIDTH)
    order = adjacent_pairs(torch.arange(HEADS * WIDTH), WIDTH, 6)
    assert order[:WIDTH].tolist() == [0, 3, 1, 4, 2, 5, 6, 7, 8, 9, 10]
    assert order[WIDTH : 2 * WIDTH].tolist() == [WIDTH + channel for channel in order[:WIDTH].tolist()]
    assert torch.equal(adjacent_pairs(weight, WIDTH, 6), weight[order])
    assert torch.equal(adjacent_pairs(bias, WIDTH, 6), bias[order])


def test_angles_are_the_frequencies_times_the_positions():
    rotary = Rotary(6, 1.3)
    torch.testing.assert_close(rotary.inv_freq, 10000.0 ** (-torch.arange(0, 6, 2) / 6))
    positions = torch.tensor([[0, 1, 2, 900], [5, 6, 7, 8]])
    cos, sin = rotary(positions, torch.float64)
    angle = positions[..., None].double() * rotary.inv_freq.double()
    assert cos.dtype == sin.dtype == torch.float64
    # float32 angles: of 900 radians 900 · 2⁻²⁴ are lost.
    torch.testing.assert_close(cos, 1.3 * angle.cos(), rtol=0, atol=1e-4)
    torch.testing.assert_close(sin, 1.3 * angle.sin(), rtol=0, atol=1e-4)
    assert Rotary(6, 1.0)(positions, torch.bfloat16)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_frequencies_stay_wide_when_cast_saved_and_loaded(dtype, tmp_path):
    model = tiny_student(rotary_channels=6).float()
    frequencies = torch.tensor([1.0, 0.123456789, 1.23456789e-5])  # not the default's, nor exact in 16 bits
    model.model.rotary.inv_freq.copy_(frequencies)
    model.save_pretrained(tmp_path / "float32")
    loaded = HyenaForCausalLM.from_pretrained(tmp_path / "float32", dtype=dtype)
    cast = model.to(dtype)
    loaded.save_pretrained(tmp_path / "half")
    again = HyenaForCausalLM.from_pretrained(tmp_path / "half")
    ids = torch.randint(1, 97, (2, 23))
    for made in (loaded, cast, again):
        assert made.lm_head.weight.dtype == dtype
        assert made.model.rotary.inv_freq.dtype == torch.float32
        assert torch.equal(made.model.rotary.inv_freq, frequencies)
        assert torch.equal(made(input_ids=ids).logits, cast(input_ids=ids).logits)


def test_a_student_without_turned_channels():
    model = tiny_student(modal=True, rotary_channels=0)
    ids = torch.randint(1, 97, (2, 23))
    first = model(input_ids=ids[:, :11])
    rest = model(input_ids=ids[:, 11:], cache=first.cache)
    assert_close(model(input_ids=ids, use_cache=False).logits[:, 11:], rest.logits, 1e-14)  # measured 8e-16
