"""A window of attention beside the long filters, heads that keep attention, and normalised features: every form."""

import pytest
import torch
from conftest import GROUPED, random_ids, tiny_student
from reference import assert_close, windowed_mixer

from scavenger import measure
from scavenger.model import HyenaCache, HyenaConfig
from scavenger.model.attention import Tokens
from scavenger.model.convolution import short_convolution
from scavenger.recipe import Recurrence
from scavenger.recurrence import certificate, recurrence


SHAPES = [
    {"filters": 5, "window": 7},
    {"filters": 10, "window": 3},
    {"filters": 5, "window": 7, "attention_heads": [[1], [], [0, 4]], "attention_window": 11},
    {"filters": 5, "attention_heads": [[2], [], [3, 4]], "attention_window": 9, "attention_layers": [1]},
    {"filters": 4, "window": 5, "attention_heads": [[], [1], []], "attention_window": 0, **GROUPED},
    {"filters": 6, "window": 7, "share_state": False, "sliding_windows": [3, 0, 0], **GROUPED},
    {"filters": 5, "window": 7, "short_filter_length": 1},
]
MODAL_SHAPES = [
    {"filters": 0, "window": 7},
    {"filters": 5, "window": 7, "positive": True},
    {"filters": 5, "window": 7, "positive": True, "features": "hedgehog"},
    {"filters": 5, "positive": True, "features": "hedgehog"},
    {"filters": 2, "window": 5, "positive": True, "features": "hedgehog", "attention_heads": [[1], [], []], **GROUPED},
    {"filters": 6, "window": 5, "positive": True, "features": "hedgehog", "share_state": False, **GROUPED},
    {"filters": 30, "positive": True},
]
FORMS = [(shape, modal) for shape in SHAPES for modal in (False, True)] + [(shape, True) for shape in MODAL_SHAPES]


def parallel_and_slow(model, layer, hidden):
    """The mixer's output before its last projection, and the same by `reference.windowed_mixer`."""
    mixer, config = model.model.layers[layer].mixer, model.config
    _, cos, sin = model.model.mask_and_angles(hidden)
    found = []
    handle = mixer.out.register_forward_pre_hook(lambda module, args: found.append(args[0]))
    mixer(hidden, cos, sin)
    handle.remove()
    projected = torch.cat([mixer.q(hidden), mixer.k(hidden), mixer.v(hidden)], -1)
    kernel = mixer.short_filter
    late = torch.nn.functional.pad(projected, (0, 0, kernel.shape[1] - 1, 0))
    x = sum(kernel[:, j] * late[:, j : j + hidden.shape[1]] for j in range(kernel.shape[1]))
    q, k, v, _ = mixer._split(x, cos, sin)
    taps = mixer.filter(hidden.shape[1]) if mixer.num_filters else hidden.new_zeros(0, 1)
    gates = None if mixer.join is None else 2 * torch.sigmoid(mixer.join(hidden)).transpose(1, 2)[..., None]
    slow = windowed_mixer(
        q,
        k,
        v,
        taps,
        gates,
        config.kept_heads(layer),
        config.near_window(layer),
        config.kept_window(layer),
        config.share_state,
        mixer.features,
    )
    return found[0], slow.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("shape, modal", [form for form in FORMS if form[0].get("filters") != 30])
def test_the_mixer_is_a_window_and_filters_beyond_it(shape, modal, device):
    model = tiny_student(modal=modal, **shape).to(device)
    torch.manual_seed(1)
    layer = 0
    hidden = torch.randn(2, 29, model.config.hidden_size, dtype=torch.float64, device=device, requires_grad=True)
    fast, slow = parallel_and_slow(model, layer, hidden)
    assert_close(slow, fast, 1e-12)
    weight = torch.randn_like(fast)
    own = [hidden, *model.model.layers[layer].mixer.parameters()]
    for a, b in zip(
        *(torch.autograd.grad((y * weight).sum(), own, allow_unused=True) for y in (slow, fast)), strict=True
    ):
        assert (a is None) == (b is None)
        if a is not None and a.abs().max() > 1e-9:
            assert_close(a, b, 1e-10)


@pytest.mark.parametrize("shape, modal", FORMS)
@pytest.mark.parametrize("split", [[63], [1] * 63, [2, 1, 60], [40] + [1] * 23, [7, 0, 30, 26]])
def test_pieces_and_steps_give_the_whole(shape, modal, split, device):
    model = tiny_student(modal=modal, **shape).to(device)
    ids = random_ids(2, 63, device=device)
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits
        cache = HyenaCache(model.config)
        pieces = [model(input_ids=piece, cache=cache).logits for piece in ids.split(split, dim=1)]
    assert_close(whole, torch.cat(pieces, dim=1), 1e-11)


@pytest.mark.parametrize("shape", SHAPES + MODAL_SHAPES)
def test_bytes_are_those_held(shape, device):
    model = tiny_student(modal=True, **shape).float().to(device)
    cache = HyenaCache(model.config)
    with torch.no_grad():
        for piece in random_ids(3, 40, device=device).split([30, *[1] * 10], dim=1):
            model(input_ids=piece, cache=cache)
    if model.config.state_grows:
        assert model.config.state_bytes is None
    else:
        assert cache.nbytes == 3 * model.config.state_bytes


@pytest.mark.parametrize("shape, modal", FORMS)
def test_padding_on_the_left_changes_nothing(shape, modal, device):
    model = tiny_student(modal=modal, **shape).to(device)
    ids = random_ids(1, 40, device=device)
    padded = torch.cat([random_ids(1, 9, device=device), ids], 1)
    mask = torch.cat([torch.zeros(1, 9, dtype=torch.long, device=device), torch.ones_like(ids)], 1)
    with torch.no_grad():
        expected = model(input_ids=ids, use_cache=False).logits
        assert_close(expected, model(input_ids=padded, attention_mask=mask, use_cache=False).logits[:, 9:], 1e-11)
        first = model(input_ids=padded[:, :20], attention_mask=mask[:, :20])
        found = [first.logits[:, 9:]]
        for t in range(20, 49):
            found.append(model(input_ids=padded[:, t : t + 1], cache=first.cache).logits)
    assert_close(expected, torch.cat(found, 1), 1e-11)


@pytest.mark.parametrize("shape", SHAPES[:1] + SHAPES[2:3] + MODAL_SHAPES[2:3])
def test_a_decoder_s_rows_are_sequences_of_their_own(shape, device):
    model = tiny_student(modal=True, **shape).float().to(device)
    prompts = [random_ids(1, length, device=device)[0] for length in (5, 33, 1, 17)]
    decoder = model.batch_decoder(rows=3)
    found = decoder.generate(prompts, 12, eos_token_id=None)
    for prompt, own in zip(prompts, found, strict=True):
        alone = model.generate(prompt[None], max_new_tokens=12, do_sample=False, eos_token_id=None)[0, len(prompt) :]
        assert torch.equal(alone, own)


@pytest.mark.parametrize("shape", [shape for shape in MODAL_SHAPES if "features" in shape])
def test_a_reduction_moves_normalised_sums_by_no_more_than_its_bound(shape, device):
    """For every input: the certificate of positive filters, and what is saved of them."""
    exact = tiny_student(modal=True, **shape).to(device)
    settings, layer = Recurrence(method="positive", state_bytes=None, tolerance=0.3, max_state_size=1), 1
    filter = exact.model.layers[layer].mixer.filter
    taps = measure.filter_taps(filter, exact.config.horizon)
    (reduced,) = recurrence.reduce_filters(taps, settings, recurrence.aims(settings))
    made = [[], [], []]
    made[layer] = reduced
    others = (own for own in exact.model.layers)
    for index, own in enumerate(others):
        if index != layer:
            known = measure.filter_taps(own.mixer.filter, exact.config.horizon)
            (made[index],) = recurrence.reduce_filters(known, settings, recurrence.aims(settings))
    recurrent = recurrence.recurrent_student(exact, made, positive=True)
    assert recurrent.config.positive and max(map(max, recurrent.config.state_sizes)) == 1
    facts = certificate.filter_facts(
        filter, recurrent.model.layers[layer].mixer.filter, reduced, settings, exact.config.horizon
    )
    torch.manual_seed(2)
    for _ in range(5):
        hidden = 3 * torch.randn(2, 63, exact.config.hidden_size, dtype=torch.float64, device=device)
        sums = []
        for model in (exact, recurrent.double()):
            mixer = model.model.layers[layer].mixer
            _, cos, sin = model.model.mask_and_angles(hidden)
            x, _ = short_convolution(
                torch.cat([mixer.q(hidden), mixer.k(hidden), mixer.v(hidden)], -1), mixer.short_filter
            )
            q, k, v, _ = mixer._split(x, cos, sin)
            if mixer.heads.kept:
                q = mixer.heads.parted(q, mixer.heads.queries)[1]
                k, v = (mixer.heads.parted(z)[1] for z in (k, v))
            tokens = Tokens(k, v, None)
            sums.append(mixer._far(q, tokens, [], None))
        moved = (sums[0] - sums[1]).norm(dim=-1).amax((0, 2)).unflatten(0, (len(facts), -1)).amax(1)
        largest = tokens.values.norm(dim=-1).amax((0, 2))
        largest = largest.repeat_interleave(len(facts) // len(largest))
        bounds = torch.tensor([entry["output_bound"] for entry in facts], device=device)
        assert (moved <= bounds * largest * (1 + 1e-9)).all() and (moved > 1e-6).any()


def test_what_no_window_and_no_filter_sees_changes_nothing(device):
    model = tiny_student(filters=0, modal=True, window=7, num_hidden_layers=1).to(device)
    ids = random_ids(1, 30, device=device)
    changed = ids.clone()
    changed[:, 10] = (ids[:, 10] + 1) % 97
    with torch.no_grad():
        moved = (model(input_ids=ids).logits - model(input_ids=changed).logits).abs().amax(-1)[0] > 1e-12
    # Two taps of the short convolution reach back from the window's oldest key.
    assert moved.nonzero().flatten().tolist() == list(range(10, 10 + 7 + 2))


@pytest.mark.parametrize(
    "wrong, named",
    [
        ({"window": 1024}, "window"),
        ({"attention_heads": [[0], []]}, "attention_heads"),
        ({"attention_heads": [[0, 1, 2, 3, 4, 5, 6, 7]] + [[]] * 5}, "attention_heads"),
        ({"window": 8, "num_filters": 512}, "turned pair"),
        ({"window": 8, "num_filters": 4}, "within a head"),
        ({"window": 8, "rotary": False}, "rotary"),
        ({"features": "hedgehog"}, "features"),
        ({"num_filters": 0}, "num_filters"),
        ({"positive": True}, "positive"),
    ],
)
def test_configurations_that_cannot_be(wrong, named):
    with pytest.raises(ValueError, match=named):
        HyenaConfig(**wrong)
