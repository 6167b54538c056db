"""Text generation: whether a model continues prompts as a reference does (its teacher), and whether it repeats itself.

All models continue the same prompts from held-out text, greedily and by sampling; the items of every metric are the
prompts. Generation does not stop at an end-of-text token, so all continuations have the same length.
"""

import dataclasses
import functools
import itertools
import os
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from tqdm import tqdm
from transformers import GenerationConfig

from scavenger import measure
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated, same_outputs
from scavenger.report.metrics import Metric


SAMPLES = 3  # prompts whose continuations are shown
COLUMNS = 160  # width of the samples shown side by side, in characters
NGRAM = 4  # as in arXiv:1908.04319
LOOP_READINGS = 3  # twice would be too few: two lines of a list often begin alike
LOOP_TOKENS = 16  # shorter loops may be a row of dashes, an indentation or an ellipsis


@dataclass(frozen=True)
class Settings:
    """Prompts of `prompt_tokens`, each continued for `new_tokens`; sampling defaults are those of a run's report."""

    prompts: int = 64
    prompt_tokens: int = 64
    new_tokens: int = 64
    temperature: float = 0.8
    top_k: int = 50
    seed: int = 0

    def __post_init__(self):
        if min(self.prompts, self.prompt_tokens, self.top_k) < 1 or self.temperature <= 0 or self.seed < 0:
            raise ValueError(
                f"found {self.prompts} prompts of {self.prompt_tokens} tokens, temperature {self.temperature}, "
                f"top-k {self.top_k} and seed {self.seed}; expected positive ones, and a seed of 0 or more"
            )
        if self.new_tokens < NGRAM:
            raise ValueError(f"found {self.new_tokens} new tokens; expected {NGRAM} or more, to look for repetitions")


def described(settings: Settings) -> dict:
    """The settings, as recorded with a result; the caller adds the reference's weights."""
    return dataclasses.asdict(settings)


@dataclass(frozen=True)
class Prepared:
    """Shared by all models: the prompts, the text that follows them, and the reference's continuations."""

    reference: Evaluated
    settings: Settings
    prompts: np.ndarray  # (prompt, prompt_tokens)
    text: np.ndarray  # (prompt, new_tokens), the held-out text after each prompt

    @functools.cached_property
    def greedy(self) -> np.ndarray:
        """The reference's greedy continuations, (prompt, new_tokens); generated on first access."""
        return continuations(self.reference.model, self.prompts, self.settings, f"{self.reference.label}, greedy")

    @functools.cached_property
    def text_losses(self) -> np.ndarray:
        """-log p of the held-out text under the reference, (prompt, new_tokens), nats."""
        return losses_of(self.reference.model, self.prompts, self.text)


def prepare(reference: Evaluated, stream: np.ndarray, settings: Settings) -> Prepared:
    """Non-overlapping prompts at seeded positions of a text's token ids; no model is run yet."""
    length = settings.prompt_tokens + settings.new_tokens
    places = len(stream) // length
    if places < settings.prompts:
        raise ValueError(
            f"the text has {len(stream)} tokens; expected {settings.prompts * length} or more, for "
            f"{settings.prompts} prompts and their continuations"
        )
    chosen = np.random.default_rng(settings.seed).choice(places, settings.prompts, replace=False)
    pieces = stream[: places * length].reshape(places, length)[chosen]
    return Prepared(reference, settings, pieces[:, : settings.prompt_tokens], pieces[:, settings.prompt_tokens :])


def comparable(model: Evaluated, reference: Evaluated):
    """Raise ValueError if two models differ in tokenizer or vocabulary size."""
    if not same_outputs([model, reference]):
        raise ValueError(
            f"{model.label} and {reference.label} have different tokens; expected models with the same tokenizer "
            "and vocabulary size"
        )


def run(
    model: Evaluated, reference: Evaluated, stream: np.ndarray, settings: Settings, prepared: Prepared | None = None
) -> dict:
    """Compare a model's generated text with a reference's; ValueError if their tokens differ or one reads too few.

    KL and top-1 agreement are measured along the reference's greedy text, which both models read. `held_out` has the
    metrics of sampled text, under the same names, for the text that really follows; `samples` has the first prompts
    and their continuations. Pass the result of `prepare` to reuse it for several models.
    """
    comparable(model, reference)
    length = settings.prompt_tokens + settings.new_tokens
    for each in (reference, model):
        if each.longest is not None and each.longest < length:
            raise ValueError(
                f"{each.label} has positions for {each.longest:,} tokens; expected {length:,} or more for a prompt and "
                "its continuation, or shorter ones"
            )
    prepared = prepared or prepare(reference, stream, settings)
    prompts = prepared.prompts
    greedy = continuations(model.model, prompts, settings, f"{model.label}, greedy")
    divergence, same = along(model.model, reference.model, prompts, prepared.greedy)
    sampled = continuations(model.model, prompts, settings, f"{model.label}, sampled", sampled=True)
    common = common_prefix(greedy, prepared.greedy)
    found = [
        _metric("greedy agreement", common / settings.new_tokens, "share", "higher", headline=True, relative=True),
        _metric("tokens until first divergence", common, "", "higher", relative=True),
        _metric("same whole continuation", common == settings.new_tokens, "share", "higher", relative=True),
        _metric("KL along the reference's text", divergence.mean(1), "nats", "lower", headline=True, relative=True),
        _metric("top-1 along the reference's text", same.mean(1), "share", "higher", relative=True),
        *_by_position(divergence),
        *_repetition(greedy, "greedy", headline=True),
        *_degeneration(sampled, losses_of(reference.model, prompts, sampled)),
    ]
    return {
        "metrics": [metrics.packed(metric) for metric in found],
        "held_out": [metrics.packed(metric) for metric in _degeneration(prepared.text, prepared.text_losses)],
        "reference": reference.label,
        "samples": _samples(prepared, greedy, sampled, common),
    }


def continuations(
    model: nn.Module, prompts: np.ndarray, settings: Settings, what: str = "continuations", sampled: bool = False
) -> np.ndarray:
    """Greedy or sampled continuations, (prompt, new_tokens), of prompts, (prompt, length)."""
    drawn = {"temperature": settings.temperature, "top_k": settings.top_k} if sampled else {}
    # The model's own config may set anything, and is used for arguments not given here. The default one has no
    # end-of-text token, at which generation would stop.
    own, model.generation_config = model.generation_config, GenerationConfig()
    rows, found = max(1, measure.BATCH_TOKENS // (prompts.shape[1] + settings.new_tokens)), []
    batches = torch.from_numpy(prompts.astype(np.int64)).split(rows)
    try:
        with torch.random.fork_rng(), torch.inference_mode():
            torch.manual_seed(settings.seed)
            for batch in tqdm(batches, desc=what, unit="batch", leave=False, dynamic_ncols=True):
                ids = model.generate(
                    batch.to(model.device),
                    attention_mask=torch.ones_like(batch, device=model.device),
                    max_new_tokens=settings.new_tokens,
                    do_sample=sampled,
                    pad_token_id=0,  # never used: all rows have the same length
                    **drawn,
                )
                found.append(ids[:, prompts.shape[1] :].cpu())
    finally:
        model.generation_config = own
    return torch.cat(found).numpy()


def along(
    model: nn.Module, reference: nn.Module, prompts: np.ndarray, text: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """KL(reference ‖ model) in nats and top-1 agreement at each token of texts that follow prompts.

    Both models read prompt and text, each (prompt, length); both results are (prompt, length of the text).
    """
    _, same, divergence, _ = _by_token(model, prompts, text, reference)
    return divergence, same


def losses_of(model: nn.Module, prompts: np.ndarray, text: np.ndarray) -> np.ndarray:
    """-log p of each token of texts that follow prompts, (prompt, length of the text), nats."""
    return _by_token(model, prompts, text)[0]


def common_prefix(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Length of the common prefix of two texts, for each row of (prompt, length)."""
    return np.cumprod(one == other, axis=1).sum(1)


def repeated_ngrams(tokens: np.ndarray, size: int = NGRAM) -> float:
    """Share of a text's n-grams that are repeats: 1 - distinct / all (seq-rep-n, arXiv:1908.04319)."""
    grams = [tuple(tokens[start : start + size]) for start in range(len(tokens) - size + 1)]
    return 1 - len(set(grams)) / len(grams)


def ends_in_loop(tokens: np.ndarray) -> bool:
    """Whether a text ends in one sequence repeated at least LOOP_READINGS times, over at least LOOP_TOKENS tokens."""
    for period in range(1, len(tokens) // LOOP_READINGS + 1):
        span = max(LOOP_READINGS * period, LOOP_TOKENS)
        if span <= len(tokens) and np.array_equal(tokens[-span:-period], tokens[len(tokens) - span + period :]):
            return True
    return False


def side_by_side(results: list[dict]) -> str:
    """The samples of all models in columns, by prompt; ‖ marks where a greedy continuation leaves the reference's."""
    reference, blocks = results[0]["reference"], []
    for number, shared in enumerate(results[0]["samples"]):
        own = {result["model"]: result["samples"][number] for result in results}
        greedy = {f"{reference}, greedy": shared["reference"]} | {
            f"{label}, greedy": _marked(sample) for label, sample in own.items() if label != reference
        }
        sampled = {"held-out text": shared["text"]}
        sampled |= {f"{label}, sampled": sample["sampled"] for label, sample in own.items()}
        blocks += [_columns({f"prompt {number + 1}": shared["prompt"]}), _columns(greedy), _columns(sampled)]
    return "\n\n".join(blocks)


def _by_token(model, prompts, text, reference=None):
    """As measure.by_token, of texts that follow prompts."""
    read = np.concatenate([prompts, text], axis=1)
    return measure.numbers(measure.by_token(model, read, reference, last=text.shape[1])).numpy()


def _metric(name, values, unit, better, headline=False, **what):
    sums = np.asarray(values, float).tolist()
    return Metric(name, sums, [1.0] * len(sums), unit, better, headline=headline, **what)


def _by_position(divergence):
    """KL by position in the continuation, in bins of doubling width: 1, 2, 3–4, 5–8, …; x is a bin's last position."""
    found, low, high, length = [], 1, 1, divergence.shape[1]
    while low <= length:
        last = min(high, length)
        inside = divergence[:, low - 1 : last]
        name = f"KL at new token {low:,}" if low == last else f"KL at new tokens {low:,}–{last:,}"
        sums, counts = inside.sum(1).tolist(), [float(inside.shape[1])] * len(inside)
        found.append(Metric(name, sums, counts, "nats", "lower", group="divergence", x=float(last), relative=True))
        low, high = high + 1, 2 * high
    return found


def _repetition(texts, kind, headline=False):
    return [
        _metric(f"repeated {NGRAM}-grams, {kind}", [repeated_ngrams(own) for own in texts], "share", "lower", headline),
        _metric(f"endings in a loop, {kind}", [ends_in_loop(own) for own in texts], "share", "lower"),
    ]


def _degeneration(texts, its_losses):
    """Repetition and loss; the loss is too low for text that repeats itself and too high for nonsense."""
    return [
        *_repetition(texts, "sampled"),
        _metric("loss of sampled text under the reference", its_losses.mean(1), "nats", ""),
    ]


def _samples(prepared, greedy, sampled, common):
    decode, found = prepared.reference.tokenizer.decode, []
    for row in range(min(SAMPLES, len(common))):
        alike, whole = int(common[row]), decode(greedy[row])
        # A character of several tokens that is split here belongs to neither half.
        agreed = os.path.commonprefix([decode(greedy[row, :alike]), whole])
        found.append(
            {
                "prompt": decode(prepared.prompts[row]),
                "text": decode(prepared.text[row]),
                "reference": decode(prepared.greedy[row]),
                "greedy": whole,
                "agreed_characters": len(agreed),
                "first_divergence": alike if alike < greedy.shape[1] else None,
                "sampled": decode(sampled[row]),
            }
        )
    return found


def _marked(sample):
    whole, agreed = sample["greedy"], sample["agreed_characters"]
    return whole if sample["first_divergence"] is None else f"{whole[:agreed]}‖{whole[agreed:]}"


def _columns(texts: dict[str, str]) -> str:
    """Texts in columns, each below its name and wrapped to its share of COLUMNS characters."""
    width = COLUMNS // len(texts) - 3
    columns = []
    for name, text in texts.items():
        lines = [name[:width], "-" * width, *text.expandtabs().strip("\n").splitlines()]
        columns.append([line[start : start + width] for line in lines for start in range(0, max(1, len(line)), width)])
    return "\n".join(
        " | ".join(cell.ljust(width) for cell in cells).rstrip()
        for cells in itertools.zip_longest(*columns, fillvalue="")
    )
