"""How well causal language models look up again what they have read, by distance, side by side.

    python eval/recall.py scavenger/assets/teacher-stdlib runs/quickstart/recurrence --text some.txt

pairs     random pairs of tokens, then every first token again, in random order, each followed by its second: is the
          second the most likely token there? (multi-query associative recall, arXiv:2312.04927, but the model is
          taken as it is and not trained for it; the gain is over values that were read as often, of other keys)
passages  other text, a passage, more of the other text, the passage again: how much less is the second reading's loss?

Pairs are binned by distance, from the previous one named (exclusive) to this one (inclusive); passages start exactly
that far apart. All sequences follow from the seed, the text and the tokenizer alone; the last line is JSON.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import scavenger.model  # noqa: F401  (AutoModel knows the student)
from scavenger.measure import BATCH_TOKENS


DISTANCES = (16, 32, 64, 128)  # tokens
# Sequences of each kind. Between seeds 0 to 2 the embedded teacher's share of right values differs by 1 point over all
# distances (by 11 at the shortest one, which has 60 to 90 queries), its gain on passages by up to 0.12 nats.
EXAMPLES = 64
# Pairs are drawn from the text's most frequent tokens, so many for each pair. With 32 pairs the embedded teacher finds
# the right one of 32 values at 16 % of the keys with 8 for each pair, at 15 % with 4, and at 10 % with all tokens of
# the text, most of which it has hardly seen; chance is 3 %. A separator after each pair did not help it.
TOKENS_PER_PAIR = 8
PASSAGE = 16  # tokens
# Other text before the first reading, without which that reading's loss is the loss of a beginning. Against the same
# passage after text in which it has not occurred, the embedded teacher seems to gain 0.5 to 0.7 nats too little with no
# such text, and with 32 tokens of it what it does gain, to 0.05.
LEAD = 32
# At the first token of the second reading nothing says yet that a repetition began (at a distance of 128 the embedded
# teacher gains 0.06 nats there); at the second, the first one does (0.9).
SKIPPED = 1


@dataclass(frozen=True)
class PairRecall:
    """Means over the keys that are asked for again at a distance."""

    distance: int  # tokens from the pair to the key's return, at most; more than the bin before
    queries: int
    top_1: float  # share where the value is the most likely token of the vocabulary
    among: float  # share where it is the most likely of the values shown; chance is 1 / pairs over all distances
    log_probability: float  # of the value, nats
    gain: float  # how much more that is than of the values not asked for yet; 0 without recall


@dataclass(frozen=True)
class PassageRecall:
    """Means over the tokens of a passage, without its first, at both readings."""

    distance: int  # tokens from the start of the first reading to the start of the second
    tokens: int
    first_loss: float  # nats per token
    second_loss: float
    gain: float  # first_loss - second_loss; also positive for a memory of which tokens occurred, in no order
    first_top_1: float
    second_top_1: float


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="checkpoint folders or Hub names")
    parser.add_argument("--text", required=True, help="a UTF-8 text file that the models have not been trained on")
    parser.add_argument("--distances", type=int, nargs="+", default=DISTANCES, help="tokens (default: 16 32 64 128)")
    parser.add_argument("--context-length", type=int, help="tokens (default: the shortest training context given)")
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        found = run(args.models, args.text, args.distances, args.context_length, args.examples, args.seed)
    except (OSError, ValueError) as error:
        print(f"recall: error: {str(error).splitlines()[0]}", file=sys.stderr)
        return 2
    print(show(found))
    print(json.dumps(found))
    return 0


def run(models: list[str], text: str, distances, context_length: int | None, examples: int, seed: int) -> list[dict]:
    """Both measurements of each model on a text file; OSError or ValueError, one line, for what cannot be measured."""
    if examples < 1 or seed < 0:
        raise ValueError(
            f"found {examples} examples and seed {seed}; expected 1 example or more and a seed of 0 or more"
        )
    try:
        read = Path(text).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text: {text} cannot be read ({error}); expected a UTF-8 text file") from None
    if context_length is None:
        context_length = min(training_context(model) for model in models)
    fit = fitting(distances, context_length)
    left_out = sorted(set(distances) - set(fit))
    if left_out:
        print(
            f"recall: a context of {context_length} tokens has no room for distances {', '.join(map(str, left_out))}: "
            f"left out (a passage takes {LEAD} + distance + {PASSAGE} tokens)",
            file=sys.stderr,
        )
    found = []
    for name in models:
        tokenizer, model = _named(name, AutoTokenizer), _named(name, AutoModelForCausalLM, dtype=torch.float32)
        model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        ids = np.array(tokenizer(read, add_special_tokens=False, verbose=False)["input_ids"], dtype=np.int64)
        pairs = associative_recall(model, ids, tokenizer.all_special_ids, fit, examples, seed)
        passages = repeated_passages(model, ids, fit, examples, seed)
        found.append(
            {
                "model": name,
                "context_length": context_length,
                "vocabulary": model.config.vocab_size,
                "pairs_shown": pairs_shown(fit),
                "pairs": [dataclasses.asdict(row) for row in pairs],
                "passages": [dataclasses.asdict(row) for row in passages],
            }
        )
    return found


def training_context(name: str) -> int:
    """Tokens that the model was trained to read at once, as its configuration says."""
    config = _named(name, AutoConfig)
    for key in ("context_length", "max_position_embeddings"):
        if getattr(config, key, None) is not None:
            return getattr(config, key)
    raise ValueError(f"{name}: the configuration names no training context; expected --context-length")


def fitting(distances, context_length: int) -> list[int]:
    """The distances whose sequences fit a context, in ascending order; ValueError where none does."""
    if min(distances) < PASSAGE:
        raise ValueError(f"found a distance of {min(distances)}; expected {PASSAGE} or more, the length of a passage")
    fit = sorted({distance for distance in distances if LEAD + distance + PASSAGE <= context_length})
    if not fit:
        raise ValueError(
            f"found a context of {context_length} tokens; expected {LEAD + min(distances) + PASSAGE} or more for a "
            f"distance of {min(distances)}"
        )
    return fit


def pairs_shown(distances) -> int:
    """As many pairs as bring the last key's return, at most, to the furthest distance: 4 tokens for each pair."""
    return max(distances) // 4


def associative_recall(
    model: nn.Module, blocks: np.ndarray, special: list[int], distances: list[int], examples: int, seed: int
) -> list[PairRecall]:
    """Recall of key-value pairs k₁ v₁ … k_n v_n, then k_π(1) v_π(1) … k_π(n) v_π(n), for each bin of distances.

    Tokens of a sequence differ from each other, and come from the most frequent ones of `blocks`, an array of ids of
    any shape, but for the `special` ones. A bin into which no query falls has no row.
    """
    count = pairs_shown(distances)
    ids, order = _pair_sequences(_frequent_tokens(blocks, special, count), count, examples, seed)
    pending = torch.ones(count, count, dtype=torch.bool).triu(1)  # values that are asked for after this query
    top, among, asked, others = [], [], [], []
    for rows, log_p in _log_probabilities(model, ids):
        at_queries = log_p[:, 2 * count :: 2]  # after each key; (example, pair, vocabulary)
        values = rows[:, 2 * count + 1 :: 2]
        shown = at_queries.gather(2, values[:, None, :].expand(-1, count, -1))
        top.append(at_queries.argmax(-1) == values)
        among.append(shown.argmax(-1) == torch.arange(count, device=rows.device))
        asked.append(shown.diagonal(dim1=1, dim2=2))
        # The last query has none: a mean over nothing, left out below.
        others.append((shown * pending.to(rows.device)).sum(-1) / pending.sum(-1).to(rows.device))
    top, among, asked, others = (torch.cat(parts).double().cpu().numpy() for parts in (top, among, asked, others))
    gain = np.where(np.isfinite(others), asked - others, np.nan)
    distance = 2 * (count + np.arange(count) - order)
    rows = []
    for low, high in zip([0, *distances], distances, strict=False):
        here = (low < distance) & (distance <= high)
        if here.any():
            means = [float(np.nanmean(value[here])) for value in (top, among, asked, gain)]
            rows.append(PairRecall(high, int(here.sum()), *means))
    return rows


def repeated_passages(
    model: nn.Module, blocks: np.ndarray, distances: list[int], examples: int, seed: int
) -> list[PassageRecall]:
    """Loss and accuracy on passages of `blocks`, an array of ids of any shape, at their first and second reading.

    A sequence is LEAD tokens, the passage, distance - PASSAGE tokens that go on from the first ones, and the passage
    again; the same passages at each distance.
    """
    other, passages = _passages(blocks, max(distances), examples, seed)
    rows = []
    for distance in distances:
        between = other[:, LEAD : LEAD + distance - PASSAGE]
        ids = np.concatenate([other[:, :LEAD], passages, between, passages], axis=1)
        losses, hits = [], []
        for batch, log_p in _log_probabilities(model, ids):
            targets = batch[:, 1:]
            losses.append(-log_p[:, :-1].gather(2, targets[..., None])[..., 0])
            hits.append(log_p[:, :-1].argmax(-1) == targets)
        losses, hits = (torch.cat(parts).double() for parts in (losses, hits))
        first, second = (  # the token at a place is predicted from the place before
            slice(start + SKIPPED - 1, start + PASSAGE - 1) for start in (LEAD, LEAD + distance)
        )
        first_loss, second_loss = losses[:, first].mean().item(), losses[:, second].mean().item()
        rows.append(
            PassageRecall(
                distance,
                examples * (PASSAGE - SKIPPED),
                first_loss,
                second_loss,
                first_loss - second_loss,
                hits[:, first].mean().item(),
                hits[:, second].mean().item(),
            )
        )
    return rows


def show(found: list[dict]) -> str:
    """Both tables as aligned text."""
    width = max(len(row["model"]) for row in found)
    lines = [f"{'pairs':<{width}}  distance  queries   top-1  among values  log p (nats)  gain (nats)"]
    for row in found:
        lines += [
            f"{row['model']:<{width}}  {'≤ ' + str(part['distance']):>8}  {part['queries']:>7,}  "
            f"{100 * part['top_1']:>4.1f} %  {100 * part['among']:>10.1f} %  {part['log_probability']:>12.3f}  "
            f"{part['gain']:>11.3f}"
            for part in row["pairs"]
        ]
        vocabulary, pairs = row["vocabulary"], row["pairs_shown"]
        lines.append(
            f"{'  by chance':<{width}}  {'':>8}  {'':>7}  {100 / vocabulary:>4.2f} %  {100 / pairs:>10.1f} %  "
            f"{-np.log(vocabulary):>12.3f}  {0:>11.3f}"
        )
    lines += ["", f"{'passages':<{width}}  distance   tokens   first (nats, top-1)  second (nats, top-1)  gain (nats)"]
    for row in found:
        lines += [
            f"{row['model']:<{width}}  {part['distance']:>8}  {part['tokens']:>7,}  "
            f"{part['first_loss']:>10.3f}  {100 * part['first_top_1']:>5.1f} %  "
            f"{part['second_loss']:>11.3f}  {100 * part['second_top_1']:>5.1f} %  {part['gain']:>11.3f}"
            for part in row["passages"]
        ]
    return "\n".join(lines)


def _named(name, kind, **options):
    """`kind.from_pretrained(name)`; an error names the model."""
    try:
        return kind.from_pretrained(name, **options)
    except (OSError, ValueError) as error:
        raise ValueError(f"{name}: {str(error).splitlines()[0]}") from error


def _frequent_tokens(blocks, special, pairs):
    """The ids that occur most often, of those that are not special, TOKENS_PER_PAIR for each pair where there are."""
    ids, counts = np.unique(np.asarray(blocks), return_counts=True)
    ordinary = ~np.isin(ids, special)
    ids, counts = ids[ordinary], counts[ordinary]
    if len(ids) < 2 * pairs:
        raise ValueError(f"the text has {len(ids)} different tokens; expected {2 * pairs} or more, for {pairs} pairs")
    return ids[np.argsort(-counts, kind="stable")[: TOKENS_PER_PAIR * pairs]]


def _pair_sequences(tokens, pairs, examples, seed):
    """Ids (example, 4 pairs), and (example, pair) which pair each query asks for."""
    rng = np.random.default_rng(seed)
    drawn = np.stack([rng.choice(tokens, (pairs, 2), replace=False) for _ in range(examples)])
    order = np.stack([rng.permutation(pairs) for _ in range(examples)])
    again = np.take_along_axis(drawn, order[..., None], axis=1)
    return np.concatenate([drawn, again], axis=1).reshape(examples, -1), order


def _passages(blocks, furthest, examples, seed):
    """Other text (example, LEAD + furthest - PASSAGE) and passages (example, PASSAGE), nowhere the same place."""
    text = np.asarray(blocks).reshape(-1)
    length = LEAD + furthest - PASSAGE
    if len(text) < length + PASSAGE:
        raise ValueError(f"the text has {len(text)} tokens; expected {length + PASSAGE} or more")
    rng = np.random.default_rng(seed)
    # Places on a ring, so that each is as likely as any other and the passage lies anywhere outside the other text.
    other = rng.integers(len(text), size=(examples, 1))
    passage = other + length + rng.integers(len(text) - length - PASSAGE + 1, size=(examples, 1))
    return tuple(text[(start + np.arange(count)) % len(text)] for start, count in ((other, length), (passage, PASSAGE)))


def _log_probabilities(model: nn.Module, ids: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids (example, length) and the log-probabilities after each of them (example, length, vocabulary), by batches."""
    device = next(model.parameters()).device
    for rows in torch.from_numpy(ids.astype(np.int64)).split(max(1, BATCH_TOKENS // ids.shape[1])):
        rows = rows.to(device)
        with torch.inference_mode():
            log_p = F.log_softmax(model(input_ids=rows, use_cache=False).logits.float(), dim=-1)
        yield rows, log_p


if __name__ == "__main__":
    sys.exit(main())
