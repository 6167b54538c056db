"""Recall by distance: how well a model retrieves earlier tokens of its context, without training for these tasks.

pairs     random key-value pairs of tokens, then every key again, in random order, each followed by its value
          (multi-query associative recall, arXiv:2312.04927)
copying   random tokens, then the same again
passkey   other text, a marker, a key of random tokens, more of the other text, and the marker: which key?
          (arXiv:2305.16300, with random tokens instead of words)
passages  other text, a passage, more of the other text, and the passage again
needle    other text, a needle of real text, more of the other text, and the needle's first tokens: what follows them?
repeats   no task: the loss on the text itself, of tokens that complete a trigram of their context again, by distance,
          and of all others (the split of arXiv:2312.04927)

The items of a task's metrics are sequences, which depend only on the seed, the text and the tokenizer; those of the
split are documents.

Distances double from 16 to BEYOND times the training context. Means are over the distances that fit the training
context, the same for all models: further away, even a teacher may be lost.
"""

import dataclasses
from dataclasses import dataclass

import numpy as np
from torch import nn

from scavenger import data, measure
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated, readable
from scavenger.report.metrics import Metric


DISTANCES = (16, 32, 64, 128)  # tokens
BEYOND = 4  # the furthest distance in training contexts, as the positions of perplexity
# Sequences of each kind. Across seeds 0 to 2 the embedded teacher's recall of pairs differs by 1 point over all
# distances (by 11 at the shortest one, which has 60 to 90 queries), its gain on passages by up to 0.12 nats.
EXAMPLES = 64
# Sequences at most at each distance beyond the training context, where only real text is read. They are long: of the
# 377,000 tokens that the quickstart's models read for recall these are 93,000; 64 sequences of every task would be
# 1,185,000. They say whether anything is recalled there, and no headline depends on them.
FAR_EXAMPLES = 16
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
# Tokens of a needle that are given again, and tokens that follow. At a distance of 208 a needle adds 18 points to the
# embedded teacher's share of right tokens if 8 are given again, 11 if 2 or 4 are; at 16, 35, 34 and 39. Of 8 tokens
# that follow instead of 4, it adds 16 and 35.
PREFIX, CONTINUATION = 8, 4
NEEDLE = PREFIX + CONTINUATION
# Places drawn for a needle, of which the one is taken whose first tokens occur least often in the other text. In the
# standard library those of 2 to 4 places in 1,000 occur there; other text may repeat itself more.
CANDIDATES = 8
OTHERS = "loss of other tokens"  # the metric of what `repeats` does not find
SPLIT_TOKENS = 65_536  # of text at most whose loss is split: as many as the quickstart's test split has


@dataclass(frozen=True)
class Settings:
    """Distances in tokens, ascending, the training context, and the number of sequences at each distance.

    window: the widest window of attention of the models; None where none has a window.
    """

    distances: tuple[int, ...]
    context_length: int
    examples: int = EXAMPLES
    seed: int = 0
    window: int | None = None

    def __post_init__(self):
        if self.examples < 1 or self.seed < 0:
            raise ValueError(
                f"found {self.examples} examples and seed {self.seed}; expected 1 example or more and a seed of 0 or "
                "more"
            )
        fitting(self.distances, self.context_length)
        right = sorted({distance for distance in self.distances if distance <= BEYOND * self.context_length})
        if list(self.distances) != right:
            raise ValueError(
                f"found distances {list(self.distances)}; expected {right}, ascending and at most {BEYOND} times the "
                f"context of {self.context_length} tokens"
            )

    @property
    def of_tokens(self) -> list[int]:
        """Distances at which sequences of random tokens fit the training context."""
        return fitting(self.distances, self.context_length)

    @property
    def of_text(self) -> list[int]:
        """Distances at which sequences of real text fit the training context."""
        return within(self.distances, self.context_length)

    @property
    def beyond_context(self) -> list[int]:
        """The other distances, at which only real text is read."""
        return [distance for distance in self.distances if distance > max(self.of_text)]

    @property
    def beyond_window(self) -> list[int]:
        """Those of `of_text` that no model's window of attention spans; none where no model has a window."""
        return [distance for distance in self.of_text if self.window is not None and distance > self.window]


def settings_for(
    models: list[Evaluated], distances=None, context_length: int | None = None, examples: int = EXAMPLES, seed: int = 0
) -> Settings:
    """Defaults: the shortest training context; distances that double from 16 to BEYOND contexts, and its furthest one.

    Distances that are more than BEYOND contexts, or further than the models can read, are left out. A context longer
    than in training tests models beyond it.
    """
    length = readable(models, context_length or min(model.training_context for model in models), "recall")
    around = LEAD + PASSAGE  # read besides the distance
    fitting(distances or DISTANCES[:1], length)
    furthest = readable(models, BEYOND * length + around, "recall beyond the context") - around
    if distances is None:
        doubling = (DISTANCES[0] << times for times in range((furthest // DISTANCES[0]).bit_length()))
        distances = [length - around, *doubling]
    windows = [model.attention_window for model in models if model.attention_window]
    kept = sorted({distance for distance in distances if distance <= furthest})
    return Settings(tuple(kept), length, examples, seed, max(windows, default=None))


def described(settings: Settings) -> dict:
    """The settings, as recorded with a result."""
    return dataclasses.asdict(settings)


def run(model: Evaluated, stream: np.ndarray, settings: Settings) -> dict:
    """All tasks on a text's token ids, and its loss split by repetition.

    `chance` is the score of guessing among the tokens used, by group; `beyond_window` has the distances that are larger
    than this model's own window. Distances beyond the training context that the text is too short for have no metric.
    """
    special, examples, seed = model.tokenizer.all_special_ids, settings.examples, settings.seed
    found = [
        *associative_recall(model.model, stream, special, settings.of_tokens, examples, seed),
        *copying(model.model, stream, special, settings.of_tokens, examples, seed),
        *passkeys(model.model, stream, special, settings.of_tokens, examples, seed),
        *needles(model.model, stream, settings.of_text, examples, seed),
        *repeated_passages(model.model, stream, settings.of_text, examples, seed),
    ]
    found += _beyond_window(found, settings.beyond_window)
    far = _read_beyond(settings, len(stream))
    if far:
        fewer = min(examples, FAR_EXAMPLES)
        further = [
            *needles(model.model, stream, far, fewer, seed),
            *repeated_passages(model.model, stream, far, fewer, seed),
        ]
        found += [metric for metric in further if metric.group]  # the curves go on, the means do not
    found += loss_of_repeats(model.model, stream, data.beginning(model.tokenizer), settings.context_length)
    pairs = pairs_shown(settings.of_tokens)
    drawn_from = len(_frequent_tokens(stream, special, settings.of_tokens))
    window = model.attention_window
    return {
        "metrics": [metrics.packed(metric) for metric in found],
        "pairs_shown": pairs,
        "tokens_drawn_from": drawn_from,
        "attention_window": window,
        "beyond_window": [distance for distance in settings.distances if window and distance > window],
        "chance": {
            "pairs": 1 / pairs,
            "copying": 1 / drawn_from,
            "passkey": drawn_from**-KEY,
            "passkey tokens": 1 / drawn_from,
            **dict.fromkeys(("pairs gain", "copying gain", "passkey gain", "needle", "needle gain", "passages"), 0.0),
        },
    }


def fitting(distances, context_length: int) -> list[int]:
    """The distances at which every task fits a context, in ascending order; ValueError if there is none."""
    if min(distances) < PASSAGE:
        raise ValueError(f"found a distance of {min(distances)}; expected {PASSAGE} or more, the length of a passage")
    fit = sorted({distance for distance in distances if _length(distance) <= context_length})
    if not fit:
        raise ValueError(
            f"found a context of {context_length} tokens; expected {_length(min(distances))} or more for a "
            f"distance of {min(distances)}"
        )
    return fit


def within(distances, context_length: int) -> list[int]:
    """The distances at which a passage and its repetition, with LEAD tokens before them, fit a context."""
    return [distance for distance in distances if LEAD + distance + PASSAGE <= context_length]


def tokens_read(settings: Settings, text_tokens: int) -> int:
    """Number of tokens that a model reads in `run` of a text."""

    def of_text(distance):
        return LEAD + distance + PASSAGE + 2 * (LEAD + distance + NEEDLE)  # needles: also with another one

    each = 4 * pairs_shown(settings.of_tokens)
    for distance in settings.of_tokens:
        each += 2 * distance  # copying
        each += 2 * (LEAD + distance + MARKER + KEY)  # passkeys, with the key and with another one
    each += sum(map(of_text, settings.of_text))
    further = sum(map(of_text, _read_beyond(settings, text_tokens)))
    return (
        settings.examples * each
        + min(settings.examples, FAR_EXAMPLES) * further
        + _contexts(text_tokens, settings.context_length) * (min(settings.context_length, text_tokens) - 1)
    )


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
    remembers tokens but not their order: a window less than PASSAGE tokens short of the distance still has the last of
    them. Beyond a model's training context it is reduced by the higher loss there (the embedded teacher, trained on 256
    tokens, gains -2.6 nats at 1,024).
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


def needles(model: nn.Module, blocks: np.ndarray, distances, examples: int, seed: int) -> list[Metric]:
    """LEAD tokens of text, a needle, more of the text up to the distance, the needle's first tokens: what follows?

    A needle is NEEDLE tokens from another place in the text: PREFIX tokens that are given again, and CONTINUATION
    tokens, which are to be predicted after them. As text can be predicted without recall, each sequence is also read
    with a needle from a third place instead. needle: share of tokens that are the most likely one, minus that share
    with the other needle. gain: log-probability of a token minus that with the other needle. Both are 0 for a model
    that does not see so far back, at any distance. All distances have the same needles.
    """
    other, needle, another = _needles(blocks, LEAD + max(distances) - NEEDLE, examples, seed)
    right, guessed, gain = [], [], []
    for distance in distances:
        between = other[:, LEAD : LEAD + distance - NEEDLE]
        places = range(LEAD + distance + PREFIX, LEAD + distance + NEEDLE)
        (hits, losses), (unshown, unseen) = (
            _predictions(
                model,
                np.concatenate([other[:, :LEAD], shown, between, needle], axis=1),
                places,
                f"needle at {distance}",
            )
            for shown in (needle, another)
        )
        right.append(hits.mean(1))
        guessed.append(unshown.mean(1))
        gain.append((unseen - losses).mean(1))
    more = [with_it - without for with_it, without in zip(right, guessed, strict=True)]
    return [
        _overall("needle", more, unit="share", headline=True),
        _overall("right tokens after a needle", right, unit="share"),
        _overall("right tokens after another needle", guessed, unit="share", better=""),
        _overall("gain of needle", gain, unit="nats"),
        *_curve("needle", distances, more, "needle", unit="share"),
        *_curve("gain of needle", distances, gain, "needle gain", unit="nats"),
    ]


def loss_of_repeats(model: nn.Module, stream: np.ndarray, beginning: int, context_length: int) -> list[Metric]:
    """Loss on a text's own tokens (token,), of those that `repeats` finds, by distance, and of all others.

    Contexts are read independently, SPLIT_TOKENS tokens of them at most, and their first tokens are not predicted. Bins
    of distances end at 16, 32, … and the context length; a bin without tokens has no metric. Items are documents, which
    start with the token `beginning`.
    """
    length, count = min(context_length, len(stream)), _contexts(len(stream), context_length)
    ids = stream[: count * length].reshape(count, length)
    loss = measure.numbers(measure.by_token(model, ids))[0].numpy()
    distance = repeats(ids)[:, 1:]
    document = np.cumsum(ids == beginning).reshape(ids.shape)[:, 1:]
    one = np.ones_like(loss)

    def metric(name, inside, **what):
        sums, counts = (np.bincount(document[inside], each[inside], document.max() + 1) for each in (loss, one))
        return Metric(name, sums.tolist(), counts.tolist(), unit="nats", better="lower", **what)

    found = [
        metric("loss of repeated trigrams", distance > 0, headline=True),
        metric(OTHERS, distance == 0, headline=True),
    ]
    low = 0
    while low < length:
        high = min(max(2 * low, DISTANCES[0]), length)
        inside = (low < distance) & (distance <= high)
        found.append(
            metric(f"loss of trigrams repeated within {low + 1:,}–{high:,}", inside, group="repeats", x=float(high))
        )
        low = high
    return [metric for metric in found if any(metric.denominators)]


def repeats(ids: np.ndarray) -> np.ndarray:
    """For each token of contexts (context, length), the distance to the trigram that it completes again, or 0.

    That of token t is t - s for the last s < t with the same two tokens before it, if token s is also token t.
    """
    bigrams = (ids[:, :-1] * (ids.max() + 1) + ids[:, 1:])[:, :-1]  # number i: the two tokens before token i + 2
    order = np.argsort(bigrams, axis=1, kind="stable")  # equal ones are beside each other, in order
    ranked = np.take_along_axis(bigrams, order, axis=1)
    apart = np.where(ranked[:, 1:] == ranked[:, :-1], np.diff(order, axis=1), 0)
    distance = np.zeros_like(ids)
    np.put_along_axis(distance, order[:, 1:] + 2, apart, axis=1)
    followed = np.take_along_axis(ids, np.arange(ids.shape[1]) - distance, axis=1)
    return np.where(followed == ids, distance, 0)


def _contexts(tokens, context_length):
    """The number of contexts of a text whose loss is split; a shorter text is one."""
    return max(1, min(SPLIT_TOKENS, tokens) // context_length)


def _read_beyond(settings, text_tokens):
    """The distances beyond the training context that a text has enough tokens for."""
    return [distance for distance in settings.beyond_context if LEAD + distance + 2 * NEEDLE <= text_tokens]


def _beyond_window(found, distances):
    """The mean gain on passages over the distances beyond every window, if there are any."""
    gains = [metric.numerators for metric in found if metric.group == "passages" and metric.x in distances]
    return [_overall("gain on repeated passages beyond the window", gains, unit="nats", headline=True)] if gains else []


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


def _needles(blocks, length, examples, seed):
    """Other text (example, length), needles (example, NEEDLE), and as many other passages, none of which overlap."""
    text = np.asarray(blocks).reshape(-1)
    places = len(text) - length - NEEDLE + 1  # where a needle can begin, outside the other text
    if places <= 2 * NEEDLE:
        raise ValueError(f"the text has {len(text)} tokens; expected {length + 3 * NEEDLE} or more")
    rng = np.random.default_rng((seed, 3))
    other = rng.integers(len(text), size=(examples, 1))
    drawn = rng.integers(places, size=(examples, CANDIDATES))

    def taken(starts, count):
        return text[(starts[..., None] + np.arange(count)) % len(text)]

    around, prefixes = taken(other, length)[:, 0], taken(other + length + drawn, PREFIX)
    occurring = np.zeros(drawn.shape, dtype=int)
    for start in range(length - PREFIX + 1):
        occurring += (prefixes == around[:, None, start : start + PREFIX]).all(-1)
    needle = np.take_along_axis(drawn, occurring.argmin(1)[:, None], axis=1)
    another = (needle + places // 2) % places  # half of the remaining text away
    return around, *(taken(other + length + start, NEEDLE)[:, 0] for start in (needle, another))


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
