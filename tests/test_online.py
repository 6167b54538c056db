"""Exact decoding gives what the whole convolution gives, in any pieces, and costs O(L log² L)."""

import copy
import math

import pytest
import torch
from conftest import GROUPED_SHAPES, normal, random_ids, tiny_student
from reference import assert_close, for_each_query, relative_error
from torch.utils._python_dispatch import TorchDispatchMode

from scavenger.model import online
from scavenger.model.filters import ImplicitFilter
from scavenger.model.online import OnlineConvolution, OnlineProduct


F64 = torch.float64
FORMS = [(OnlineConvolution, 1), (OnlineConvolution, 3), (OnlineProduct, 3)]  # and channels of a head
SHAPES = [
    {"filters": 30},
    {"filters": 5},
    {"filters": 3},  # heads of ten channels: not tiled
    {"filters": 30, "hyena_order": 2},
    {"filters": 30, "hyena_order": 3},
    {"filters": 5, "attention_layers": [1], "attention_window": 7},
    {"filters": 30, "attention_layers": [0, 2], "attention_window": 0},
    *GROUPED_SHAPES,
]
GREEDY = dict(do_sample=False, eos_token_id=None, pad_token_id=0)


def plain(q, k, v, taps):
    """The dot products of one query, all at once: ((q kᵀ) ⊙ T) v with T_ts = h_{t-s}, 0 where s > t."""
    places = torch.arange(q.shape[2], device=q.device)
    lags = places[:, None] - places
    return ((q @ k.transpose(-1, -2)) * taps[:, lags.clamp(min=0)] * (lags >= 0)) @ v


def in_pieces(form, q, k, v, taps, lengths):
    """The outputs of a piece after the other; taps as a cache gives them."""
    each, outputs, read = form(), [], 0
    for piece in zip(*(z.split(lengths, dim=-2) for z in (q, k, v)), strict=True):
        read += piece[1].shape[2]
        outputs.append(each.advance(*piece, taps[:, : 1 << max(0, read - 1).bit_length()]))
    return torch.cat(outputs, dim=3)


def inputs(batch, filters, queries, length, width, device):
    """q, k and v."""
    q = normal(batch, filters, queries, length, width, device=device)
    return q, *normal(2, batch, filters, length, width, device=device)


def splits(length):
    """A prompt of 0, 1, 2, 17 and all but one token and single steps; and pieces of many lengths, none included."""
    for prompt in sorted({k for k in (0, 1, 2, 17, length - 1) if k < length}):
        yield [prompt] + [1] * (length - prompt)
    yield [length]
    pieces, size = [], 1
    while sum(pieces) + size < length:
        pieces += [size, 0]
        size = 3 * size % 101
    yield [*pieces, length - sum(pieces)]


@pytest.mark.slow
@pytest.mark.parametrize("form, width", FORMS)
@pytest.mark.parametrize("queries", [1, 2])
@pytest.mark.parametrize("length", [1, 2, 3, 17, 63, 64, 65, 200])
def test_any_pieces_give_the_plain_dot_product(form, width, queries, length, monkeypatch, device):
    q, k, v = inputs(4, 5, queries, length, width, device)
    taps = normal(5, 256, device=device)
    expected = for_each_query(plain, q, k, v, taps)
    for near in (1, 4, online.NEAR):
        monkeypatch.setattr(online, "NEAR", near)
        monkeypatch.setattr(online, "PIECE", near * 500)  # some tiles row by row, some not
        for lengths in splits(length):
            assert_close(expected, in_pieces(form, q, k, v, taps, lengths), 1e-14)  # measured 1e-15


@pytest.mark.parametrize("dtype, tolerance", [(F64, 1e-14), (torch.float32, 5e-6)])  # measured 1e-15 and 5e-7
def test_a_thousand_tokens(dtype, tolerance, device):
    q, k, v = inputs(1, 7, 2, 1000, 1, device)
    taps = normal(7, 1024, device=device)
    expected = for_each_query(plain, q, k, v, taps).to(dtype)
    q, k, v, taps = (z.to(dtype) for z in (q, k, v, taps))
    for lengths in ([1] * 1000, [17] + [1] * 983, [999, 1], [500, 3, 1, 496]):
        assert_close(expected, in_pieces(OnlineConvolution, q, k, v, taps, lengths), tolerance)


def test_without_the_tiles_it_would_be_wrong(monkeypatch, device):
    q, k, v = inputs(2, 5, 3, 100, 1, device)
    taps = normal(5, 128, device=device)
    expected = for_each_query(plain, q, k, v, taps)
    monkeypatch.setattr(online, "tile", lambda u, spectrum: torch.zeros_like(u))
    found = in_pieces(OnlineConvolution, q, k, v, taps, [1] * 100)
    near, far = slice(online.NEAR), slice(online.NEAR, None)
    assert_close(expected[:, :, :, near], found[:, :, :, near], 1e-14)
    assert relative_error(expected[:, :, :, far], found[:, :, :, far]) > 0.5


class Work(TorchDispatchMode):
    """Counts what the operators do: size · log₂ of each transform, and each number that is read or written once."""

    total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and "fft" in str(func):
            size = max(args[0].shape[-1], result.shape[-1])
            self.total += result.numel() * math.log2(size)
        elif "bmm" in str(func):
            self.total += args[0].numel() * args[1].shape[-1]
        elif func.is_view is False and isinstance(result, torch.Tensor):
            self.total += max(z.numel() for z in (result, *args) if isinstance(z, torch.Tensor))
        return result


@pytest.mark.slow
def test_work_grows_as_the_length_and_two_logarithms():
    def work(form, length):
        q, (k, v) = torch.randn(1, 2, 1, length, 1), torch.randn(2, 1, 2, length, 1)
        taps = torch.randn(2, length)
        with Work() as count:
            in_pieces(form, q, k, v, taps, [1] * length)
        return count.total

    lengths = (256, 1024)
    short, long = (work(OnlineConvolution, length) / (length * math.log2(length) ** 2) for length in lengths)
    assert long < short
    short, long = (work(OnlineProduct, length) / length**2 for length in lengths)
    assert long > 0.9 * short  # the plain product is seen to cost L²


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("near", [4, 32])
@torch.no_grad()
def test_a_model_in_pieces_gives_the_whole_sequence(shape, near, monkeypatch, device):
    monkeypatch.setattr(online, "NEAR", near)
    model = tiny_student(**shape).to(device)
    ids = random_ids(2, 83, device=device)  # beyond the training length of 63
    whole = model(input_ids=ids, use_cache=False).logits
    for lengths in ([1] * 83, [0, 2] + [1] * 81, [3, 80], [40, 1, 0, 30, 12], [82, 1]):
        cache, logits = None, []
        for piece in ids.split(lengths, dim=1):
            out = model(input_ids=piece, cache=cache, use_cache=True)
            cache = out.cache
            logits.append(out.logits)
        assert_close(whole, torch.cat(logits, dim=1), 1e-12)  # measured 2e-14
        assert cache.get_seq_length() == 83


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_nothing_in_nothing_out(shape, device):
    model = tiny_student(**shape).to(device)
    for size in ((0, 40), (2, 0)):
        out = model(input_ids=torch.zeros(size, dtype=torch.long, device=device))
        again = model(input_ids=torch.zeros(size, dtype=torch.long, device=device), cache=out.cache)
        assert out.logits.shape == again.logits.shape == (*size, 97)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("beams", [1, 3])
def test_generation_is_that_without_a_cache(shape, beams, device):
    model = tiny_student(**shape).to(device)
    ids = random_ids(2, 9, low=1, device=device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    arguments = dict(num_beams=beams, max_new_tokens=41, return_dict_in_generate=True, **GREEDY)
    found = model.generate(ids, attention_mask=mask, **arguments)
    anew = model.generate(ids, attention_mask=mask, use_cache=False, **arguments)
    assert anew.cache is None
    assert found.cache.get_seq_length() == 49
    assert torch.equal(found.sequences, anew.sequences)
    alone = model.generate(ids[1:, 5:], attention_mask=mask[1:, 5:], **arguments)
    assert torch.equal(alone.sequences[:, 4:], found.sequences[1:, 9:])


@pytest.mark.parametrize("shape", SHAPES)
def test_rows_of_a_cache_are_chosen_and_repeated(shape, device):
    model = tiny_student(**shape).to(device)
    ids = random_ids(3, 70, low=1, device=device)
    rows = torch.tensor([2, 0], device=device)
    with torch.inference_mode():  # and read on outside of it
        prompt = model(input_ids=ids[:, :65]).cache
        for place in (65, 66):
            model(input_ids=ids[:, place : place + 1], cache=prompt)
    size = prompt.nbytes
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits[:, -3:]
        for change, wanted in (
            (lambda cache: cache.batch_select_indices(rows), rows),
            (lambda cache: cache.reorder_cache(rows), rows),
            (lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1, 2, 2], device=device)),
            (lambda cache: None, torch.arange(3, device=device)),
        ):
            cache = copy.deepcopy(prompt)
            change(cache)
            found = [model(input_ids=ids[wanted, t : t + 1], cache=cache).logits for t in (67, 68, 69)]
            assert_close(expected[wanted], torch.cat(found, dim=1), 1e-12)
    assert (prompt.get_seq_length(), prompt.nbytes) == (67, size)


def test_chat_turns_go_on_from_the_cache(device):
    model = tiny_student(attention_layers=[1], attention_window=5).to(device)
    ids, mask = random_ids(2, 9, low=1, device=device), torch.ones(2, 9, dtype=torch.long, device=device)
    mask[0, :4] = 0
    arguments = dict(max_new_tokens=26, return_dict_in_generate=True, **GREEDY)
    cache = None
    for turn in (3, 1, 2):
        continued = model.generate(ids, attention_mask=mask, cache=cache, **arguments)
        anew = model.generate(ids, attention_mask=mask, use_cache=False, **arguments)
        assert torch.equal(continued.sequences, anew.sequences)
        cache = continued.cache
        ids = torch.cat([continued.sequences, random_ids(2, turn, low=1, device=device)], dim=1)
        mask = torch.cat([mask, torch.ones(2, 26 + turn, dtype=torch.long, device=device)], dim=1)
    cache.reset()
    assert (cache.nbytes, cache.get_seq_length()) == (0, 0)
    expected = model.generate(ids, max_new_tokens=8, **GREEDY)
    assert torch.equal(expected, model.generate(ids, cache=cache, max_new_tokens=8, **GREEDY))
    assert torch.equal(expected, model.generate(ids, max_new_tokens=8, prefill_chunk_size=7, **GREEDY))
    embedded = model.get_input_embeddings()(ids)
    found = model.generate(inputs_embeds=embedded, max_new_tokens=8, **GREEDY)
    assert torch.equal(expected[:, ids.shape[1] :], found)


@pytest.mark.parametrize("shape", SHAPES)
@torch.no_grad()
def test_memory_is_linear_and_taps_grow_by_doubling(shape, monkeypatch, device):
    model = tiny_student(**shape).float().to(device)
    asked = []
    forward = ImplicitFilter.forward
    monkeypatch.setattr(ImplicitFilter, "forward", lambda self, length: asked.append(length) or forward(self, length))
    cache, sizes = None, {}
    for read in range(1, 150):
        cache = model(input_ids=torch.full((2, 1), 7, device=device), cache=cache).cache
        sizes[read] = cache.nbytes
    config, kept = model.config, len(model.config.attention_layers)
    mixers = 3 - kept
    assert asked == [length for length in (1, 2, 4, 8, 16, 32, 64, 128, 256) for _ in range(mixers)]
    # A token, in both rows: u, or keys and values.
    numbers = 2 * config.filtered_width * max(2, config.filter_head_width) * config.hyena_order
    taps = config.num_filters * config.hyena_order
    inputs = config.num_attention_heads * config.head_dim + 2 * config.key_value_width
    inputs += max(0, config.hyena_order - 2) * config.filtered_width
    for read, size in sizes.items():
        held = mixers * (numbers + taps) * 4 * 2 * max(read, online.NEAR)  # twice the tokens at most
        others = 2 * 4 * mixers * 2 * inputs  # short convolutions
        others += 2 * kept * (2 * 4 * config.key_value_width + 1) * (read + 7)  # windows
        assert size <= held + others


def test_gradients_are_those_of_the_whole_or_refused(device):
    model = tiny_student(attention_layers=[1], attention_window=7).to(device)
    ids = random_ids(2, 29, device=device)
    gradients = []
    for use_cache in (False, True):
        out = model(input_ids=ids, labels=ids, use_cache=use_cache)
        gradients.append(torch.autograd.grad(out.loss, list(model.parameters())))
    for a, b in zip(*gradients, strict=True):
        assert_close(a, b, 1e-12)
    refused = "expected torch.no_grad"
    with torch.no_grad(), pytest.raises(ValueError, match=refused):
        model(input_ids=ids[:, :1], cache=out.cache)
    with torch.no_grad():
        cache = model(input_ids=ids).cache
    with pytest.raises(ValueError, match=refused) as error:
        model(input_ids=ids[:, :1], cache=cache)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [*SHAPES[:3], *GROUPED_SHAPES[:2]])
@torch.no_grad()
def test_half_precision_and_autocast(shape, device):
    """Convolutions and what they keep are float32: what is lost is the rounding around them."""
    exact, ids = tiny_student(**shape).float().to(device), random_ids(2, 63, device=device)
    half = copy.deepcopy(exact).to(torch.bfloat16)
    expected = exact(input_ids=ids, use_cache=False).logits[:, 40:]
    for model, autocast in ((half, False), (exact, True)):
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=autocast):
            cache = model(input_ids=ids[:, :40]).cache
            found = [model(input_ids=ids[:, t : t + 1], cache=cache).logits for t in range(40, 63)]
        assert {state.dtype for layer in cache.layers for state in layer.states[1:]} == {torch.float32}
        assert_close(expected, torch.cat(found, dim=1).float(), 6e-2)


def test_caches_of_the_other_filters_are_refused():
    ids = torch.randint(1, 97, (1, 5))
    with torch.no_grad():
        caches = [tiny_student(modal=modal)(input_ids=ids).cache for modal in (False, True)]
    for modal, cache in zip((True, False), caches, strict=True):
        with pytest.raises(ValueError, match="filters; expected one of (modal|implicit) filters"):
            tiny_student(modal=modal)(input_ids=ids, cache=cache)
