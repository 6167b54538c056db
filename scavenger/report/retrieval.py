"""Recall by distance: how well a model retrieves earlier tokens of its context, without training for these tasks.

pairs     random key-value pairs of tokens, then every key again, in random order, each followed by its value
          (multi-query associative recall, arXiv:2312.04927)
copying   random tokens, then the same again
passkey   other text, a marker, a key of random tokens, more of the other text, and the marker: which key?
          (arXiv:2305.16300, with random tokens instead of words)
passages  other text, a passage, more of the other text, and the passage again

The items of every metric are sequences, which depend only on the seed, the text and the tokenizer.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import nn

from scavenger import measure
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated, readable
from scavenger.report.metrics import Metric


DISTANCES = (16, 32, 64, 128)  # tokens
# Sequences of each kind. Across seeds 0 to 2 the embedded teacher's recall of pairs differs by 1 point over all
# distances (by 11 at the shortest one, which has 60 to 90 queries), its gain on passages by up to 0.12 nats.
EXAMPLES = 64
# Random tokens are drawn from the text's most frequent ones, this many per pair. With 32 pairs the embedded teacher
# finds the correct one of 32 values for 16 % of the keys with 8 tokens per pair, for 15 % with 4, and for 10 % with all
# tokens of the text, most of which it has rarely seen; chance is 3 %. A separator after each pair did not help.
TOKENS_PER_PAIR = 8
PASSAGE = 16  # tokens
# Tokens of other text before the first occurrence, which would otherwise begin the sequence. Relative to the same
# passage after text that does not contain it, the embedded teacher's gain is measured 0.5 to 0.7 nats too low without
# such text, and correctly to 0.05 nats with 32 tokens of it.
LEAD = 32
# The first token of a repetition cannot be predicted (at a distance of 128 the embedded teacher gains 0.06 nats there);
# the second follows from the first (0.9). Repeated random tokens have no separator before them either: of 15 tokens the
# embedded teacher copies 11 % without one, 10 % after a newline, and 7 % after an end-of-text token, after which it has
# learned to expect another document.
SKIPPED = 1
# Tokens before a key. At a distance of 128 the embedded teacher gains 1.9 nats on the key's first token with 2 marker
# tokens, 2.2 with 4 and 2.1 with 8 (means of two seeds).
MARKER = 4
# Tokens of a key. Chance is already one key in 65,000, and longer keys distinguish small models even less: of 64 keys
# the embedded teacher finds 0 or 1 at each distance, and 0 if they have 4 tokens.
KEY = 2


@dataclass(frozen=True)
class Settings:
    """Distances in tokens, the context length that they must fit, and the number of sequences at each distance.

    beyond_window: one more distance, of repeated passages alone, beyond the attention window of students. It is not in
    their mean, which is over the same distances for all models.
    """

    distances: tuple[int, ...]
    context_length: int
    examples: int = EXAMPLES
    seed: int = 0
    beyond_window: int | None = None

    def __post_init__(self):
        if self.examples < 1 or self.seed < 0:
            raise ValueError(
                f"found {self.examples} examples and seed {self.seed}; expected 1 example or more and a seed of 0 or "
                "more"
            )
        if list(self.distances) != fitting(self.distances, self.context_length):
            raise ValueError(
                f"found distances {list(self.distances)}; expected "
                f"{fitting(self.distances, self.context_length)}, which fit {self.context_length} tokens"
            )


def settings_for(
    models: list[Evaluated], distances=None, context_length: int | None = None, examples: int = EXAMPLES, seed: int = 0
) -> Settings:
    """Defaults: the shortest training context, and distances that double from 16 as long as they fit it.

    Given distances that do not fit are left out; a context longer than in training tests models beyond it. Where all
    of the default distances lie within a student's attention window, passages are also repeated as far apart as they
    fit, if that is beyond the window.
    """
    length, beyond = context_length or min(model.training_context for model in models), None
    length = readable(models, length, "recall")
    if distances is None:
        distances = [DISTANCES[0]]
        while _length(2 * distances[-1]) <= length:
            distances.append(2 * distances[-1])
        window, furthest = max((model.attention_window or 0 for model in models), default=0), length - LEAD - PASSAGE
        beyond = furthest if distances[-1] <= window < furthest else None
    return Settings(tuple(fitting(distances, length)), length, examples, seed, beyond)


def described(settings: Settings) -> dict:
    """The settings, as recorded with a result."""
    return dataclasses.asdict(settings)


def run(model: Evaluated, stream: np.ndarray, settings: Settings) -> dict:
    """All four tasks on a text's token ids; `chance` is the score of guessing among the tokens used, by group."""
    special, asked = model.tokenizer.all_special_ids, (settings.distances, settings.examples, settings.seed)
    found = [
        *associative_recall(model.model, stream, special, *asked),
        *copying(model.model, stream, special, *asked),
        *passkeys(model.model, stream, special, *asked),
        *repeated_passages(model.model, stream, *asked),
    ]
    if settings.beyond_window is not None:
        far = repeated_passages(model.model, stream, (settings.beyond_window,), settings.examples, settings.seed)
        found += [metric for metric in far if metric.group]
    pairs = pairs_shown(settings.distances)
    drawn_from = len(_frequent_tokens(stream, special, settings.distances))
    return {
        "metrics": [metrics.packed(metric) for metric in found],
        "pairs_shown": pairs,
        "tokens_drawn_from": drawn_from,
        "chance": {
            "pairs": 1 / pairs,
            "copying": 1 / drawn_from,
            "passkey": drawn_from**-KEY,
            "passkey tokens": 1 / drawn_from,
            **dict.fromkeys(("pairs gain", "copying gain", "passkey gain", "passages"), 0.0),
        },
    }


def fitting(distances, context_length: int) -> list[int]:
    """The distances whose sequences fit a context, in ascending order; ValueError if none does."""
    if min(distances) < PASSAGE:
        raise ValueError(f"found a distance of {min(distances)}; expected {PASSAGE} or more, the length of a passage")
    fit = sorted({distance for distance in distances if _length(distance) <= context_length})
    if not fit:
        raise ValueError(
            f"found a context of {context_length} tokens; expected {_length(min(distances))} or more for a "
            f"distance of {min(distances)}"
        )
    return fit


def tokens_read(settings: Settings) -> int:
    """Number of tokens that a model reads in `run`."""
    each = 4 * pairs_shown(settings.distances)
    for distance in settings.distances:
        each += 2 * distance  # copying
        each += 2 * (LEAD + distance + MARKER + KEY)  # passkeys, with the key and with another one
        each += LEAD + distance + PASSAGE  # passages
    if settings.beyond_window is not None:
        each += LEAD + settings.beyond_window + PASSAGE
    return settings.examples * each


def pairs_shown(distances) -> int:
    """Number of pairs such that keys are repeated within the largest distance: 4 tokens per pair."""
    return max(distances) // 4


def associative_recall(
    model: nn.Module, blocks: np.ndarray, special: list[int], distances, examples: int, seed: int
) -> list[Metric]:
    """Recall of key-value pairs k₁ v₁ … k_n v_n, then k_π(1) v_π(1) … k_π(n) v_π(n), for each bin of distances.

    pairs: share of queries whose value is the most likely of all values shown; chance is 1 / n. gain: log-probability
    of the value minus the mean over values not queried yet, which were read as often, for other keys; it is 0 for a
    model that only knows which tokens occurred. Distances run from the key's pair to its repetition, in bins from the
    previous distance (exclusive) to this one (inclusive); a bin without queries has no metric. The tokens of a sequence
    are distinct, from the most frequent ones of `blocks` (ids of any shape) without the `special` ones.
    """
    count = pairs_shown(distances)
    ids, order = _pair_sequences(_frequent_tokens(blocks, special, distances), count, examples, seed)
    pending = np.triu(np.ones((count, count), dtype=bool), 1)  # values that are queried after this one
    values = ids[:, 2 * count + 1 :: 2]
    choices = np.broadcast_to(values[:, None, :], (examples, count, count))
    shown, likeliest = _read(model, ids, range(2 * count, 4 * count, 2), choices, "pairs")  # (example, query, value)
    top, among = likeliest == values, shown.argmax(-1) == np.arange(count)
    # The last query has no others: its mean is NaN and left out below.
    with np.errstate(invalid="ignore"):
        others = (shown * pending).sum(-1) / pending.sum(-1)
    gain = shown.diagonal(axis1=1, axis2=2) - others
    distance = 2 * (count + np.arange(count) - order)
    bins = [(low < distance) & (distance <= high) for low, high in zip([0, *distances], distances, strict=False)]
    every = np.ones_like(order, dtype=bool)

    def metric(name, values, inside, **what):
        counted = inside & np.isfinite(values)
        sums = np.where(counted, values, 0.0).sum(1)
        return Metric(name, sums.tolist(), counted.sum(1).astype(float).tolist(), better="higher", **what)

    found = [
        metric("recall of pairs", among, every, unit="share", headline=True),
        metric("recall of pairs among all tokens", top, every, unit="share"),
        metric("gain of pairs", gain, every, unit="nats"),
    ]
    for name, group, values, unit in (
        ("pairs", "pairs", among, "share"),
        ("gain of pairs", "pairs gain", gain, "nats"),
    ):
        found += [
            metric(f"{name} at ≤ {high}", values, inside, unit=unit, group=group, x=float(high))
            for high, inside in zip(distances, bins, strict=True)
        ]
    return [metric for metric in found if any(metric.denominators)]


def copying(
    model: nn.Module, blocks: np.ndarray, special: list[int], distances, examples: int, seed: int
) -> list[Metric]:
    """x₁ … x_n x₁ … x_n, distinct random tokens, n the distance: top-1 accuracy on the second occurrence.

    gain: log-probability at the second occurrence minus that at the first; also positive for a model that remembers
    tokens but not their order. The first token is left out. A shorter sequence begins with a longer one's tokens.
    """
    drawn = _drawn(_frequent_tokens(blocks, special, distances), max(distances), examples, (seed, 1))
    right, gain = [], []
    for distance in distances:
        ids = np.tile(drawn[:, :distance], 2)
        hits, losses = _predictions(model, ids, range(SKIPPED, 2 * distance), f"copying at {distance}")
        count = distance - SKIPPED
        right.append(hits[:, -count:].mean(1))
        gain.append(losses[:, :count].mean(1) - losses[:, -count:].mean(1))
    return [
        _overall("copying", right, unit="share", headline=True),
        _overall("gain of copying", gain, unit="nats"),
        *_curve("copying", distances, right, "copying", unit="share"),
        *_curve("gain of copying", distances, gain, "copying gain", unit="nats"),
    ]


def passkeys(
    model: nn.Module, blocks: np.ndarray, special: list[int], distances, examples: int, seed: int
) -> list[Metric]:
    """LEAD tokens of text, a marker, a key, more of the text up to the distance, the marker: does the key follow?

    A key is correct if each of its tokens is the most likely one after the marker and the key's previous tokens. This
    equals greedy decoding, which feeds back the key's own tokens as long as all were correct. gain: log-probability of
    a key's token minus that of the same token if another key was shown; also positive for a model that remembers tokens
    but not their order. Markers and keys are random tokens, different in each sequence, so that intervals include the
    variation between them.
    """
    drawn = _drawn(_frequent_tokens(blocks, special, distances), MARKER + 2 * KEY, examples, (seed, 2))
    marker, key, another = np.split(drawn, [MARKER, MARKER + KEY], axis=1)
    text, _ = _passages(blocks, LEAD + max(distances) - MARKER - KEY, examples, seed)
    whole, tokens, gain = [], [], []
    for distance in distances:
        between = text[:, LEAD : LEAD + distance - MARKER - KEY]
        places = range(LEAD + distance + MARKER, LEAD + distance + MARKER + KEY)
        (hits, losses), (_, unseen) = (
            _predictions(
                model,
                np.concatenate([text[:, :LEAD], marker, shown, between, marker, key], axis=1),
                places,
                f"passkey at {distance}",
            )
            for shown in (key, another)
        )
        whole.append(hits.all(1).astype(float))
        tokens.append(hits.mean(1))
        gain.append((unseen - losses).mean(1))
    return [
        _overall("passkey", whole, unit="share", headline=True),
        _overall("passkey tokens", tokens, unit="share"),
        _overall("gain of passkey", gain, unit="nats"),
        *_curve("passkey", distances, whole, "passkey", unit="share"),
        *_curve("passkey tokens", distances, tokens, "passkey tokens", unit="share"),
        *_curve("gain of passkey", distances, gain, "passkey gain", unit="nats"),
    ]


def repeated_passages(model: nn.Module, blocks: np.ndarray, distances, examples: int, seed: int) -> list[Metric]:
    """Loss on passages of `blocks` (ids of any shape) at their second occurrence, and the gain over the first.

    A sequence is LEAD tokens, the passage, distance - PASSAGE tokens that continue the first ones, and the passage
    again; all distances have the same passages, without their first token. The gain is also positive for a model that
    remembers tokens but not their order; beyond a model's training context it is reduced by the higher loss there (the
    embedded teacher, trained on 256 tokens, gains -2.6 nats at 1,024).
    """
    other, passages = _passages(blocks, LEAD + max(distances) - PASSAGE, examples, seed)
    first, again, right = [], [], []
    for distance in distances:
        between = other[:, LEAD : LEAD + distance - PASSAGE]
        ids = np.concatenate([other[:, :LEAD], passages, between, passages], axis=1)
        places = [start + place for start in (LEAD, LEAD + distance) for place in range(SKIPPED, PASSAGE)]
        hits, losses = _predictions(model, ids, places, f"passages at {distance}")
        count = PASSAGE - SKIPPED
        first.append(losses[:, :count].mean(1))
        again.append(losses[:, count:].mean(1))
        right.append(hits[:, count:].mean(1))
    gain = [before - after for before, after in zip(first, again, strict=True)]
    return [
        _overall("gain on repeated passages", gain, unit="nats", headline=True),
        _overall("loss of passages read first", first, unit="nats", better="lower"),
        _overall("loss of passages read again", again, unit="nats", better="lower"),
        _overall("right tokens of passages read again", right, unit="share"),
        *_curve("passages", distances, gain, "passages", unit="nats"),
        *_curve("loss of passages read again", distances, again, "passages loss", unit="nats", better="lower"),
    ]


def _length(distance):
    """Length of the longest sequence at a distance, of passages or of copying."""
    return max(LEAD + distance + PASSAGE, 2 * distance)


def _overall(name, values, better="higher", **what):
    """The mean over distances; `values` has an array over sequences for each of them."""
    return Metric(name, np.sum(values, axis=0).tolist(), [float(len(values))] * len(values[0]), better=better, **what)


def _curve(name, distances, values, group, better="higher", **what):
    """A metric for each distance."""
    return [
        Metric(
            f"{name} at {distance}",
            own.tolist(),
            [1.0] * len(own),
            better=better,
            group=group,
            x=float(distance),
            **what,
        )
        for distance, own in zip(distances, values, strict=True)
    ]


def _frequent_tokens(blocks, special, distances):
    """The most frequent ids that are not special: TOKENS_PER_PAIR for each pair, or all if there are fewer."""
    ids, counts = np.unique(np.asarray(blocks), return_counts=True)
    ordinary = ~np.isin(ids, special)
    ids, counts = ids[ordinary], counts[ordinary]
    if len(ids) < max(distances):
        raise ValueError(
            f"the text has {len(ids)} different tokens; expected {max(distances)} or more, for a distance of "
            f"{max(distances)}"
        )
    return ids[np.argsort(-counts, kind="stable")[: TOKENS_PER_PAIR * pairs_shown(distances)]]


def _drawn(tokens, count, examples, seed):
    """Random tokens, distinct within a sequence, (example, count)."""
    rng = np.random.default_rng(seed)
    return np.stack([rng.choice(tokens, count, replace=False) for _ in range(examples)])


def _pair_sequences(tokens, pairs, examples, seed):
    """Ids (example, 4 pairs), and the index of each query's pair (example, pair)."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(tokens, (pairs, 2), replace=False) for _ in range(examples)])
    order = np.stack([rng.permutation(pairs) for _ in range(examples)])
    again = np.take_along_axis(drawn, order[..., None], axis=1)
    return np.concatenate([drawn, again], axis=1).reshape(examples, -1), order


def _passages(blocks, length, examples, seed):
    """Other text (example, length) and passages (example, PASSAGE) that do not overlap with it."""
    text = np.asarray(blocks).reshape(-1)
    if len(text) < length + PASSAGE:
        raise ValueError(f"the text has {len(text)} tokens; expected {length + PASSAGE} or more")
    rng = np.random.default_rng(seed)
    # Positions wrap around: all are equally likely, and the passage can be anywhere outside the other text.
    other = rng.integers(len(text), size=(examples, 1))
    passage = other + length + rng.integers(len(text) - length - PASSAGE + 1, size=(examples, 1))
    return tuple(text[(start + np.arange(count)) % len(text)] for start, count in ((other, length), (passage, PASSAGE)))


def _predictions(model, ids, places, what):
    """Whether the tokens at these positions are the most likely ones, and their -log p: (example, place)."""
    targets = ids[:, list(places)]
    log_p, likeliest = _read(model, ids, [place - 1 for place in places], targets[..., None], what)
    return likeliest == targets, -log_p[..., 0]


def _read(model: nn.Module, ids: np.ndarray, places, choices: np.ndarray, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Log-probabilities of choices (example, place, choice) after these ascending places, and the most likely token."""
    wanted = np.isin(np.arange(ids.shape[1]), list(places))
    flat = choices.reshape(-1, choices.shape[2])
    log_p, likeliest = measure.log_probabilities(model, ids, wanted, flat, what)
    return log_p.reshape(choices.shape), likeliest.reshape(choices.shape[:2])
