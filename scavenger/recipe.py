"""A recipe: one YAML file, one frozen dataclass per section, every default written down.

A section has the name of the module that reads it. A field carries its meaning, its unit and its bounds (`key`), from
which values are checked and docs/recipes.md is generated. Loading touches no file but the recipe and the folders it
names; it imports neither torch nor transformers, so that a mistake is reported at once.
"""

import dataclasses
import difflib
import json
import re
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import yaml

from scavenger import families


EMBEDDED_TEACHER = Path(__file__).parent / "assets" / "teacher-stdlib"

# Keys of earlier versions, with the only value that today's code stands for: a saved recipe may still have them.
REMOVED = {"recurrence.prefill_outputs": "recurrent"}


class RecipeError(Exception):
    """One line for a person: what is wrong, where, and what would be right."""


class _Wrong(Exception):
    """A value that a section refuses; the loader adds the file and the section's name."""

    def __init__(self, key, found, right):
        super().__init__(key, found, right)
        self.key, self.found, self.right = key, found, right


def _require(condition, key, found, right):
    if not condition:
        raise _Wrong(key, found, right)


@dataclass(frozen=True)
class Bounds:
    """The values that a key takes, of a list each item; `right` says it in words, after "expected"."""

    right: str
    least: float | None = None  # inclusive
    most: float | None = None
    above: float | None = None  # exclusive
    below: float | None = None

    def hold(self, value) -> bool:
        return (
            (self.least is None or value >= self.least)
            and (self.most is None or value <= self.most)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
        )


def key(meaning: str, default=dataclasses.MISSING, *, unit: str = "", right: str = "", **bounds):
    """A field of a section: its meaning, its default (none: it must be given), its unit and its bounds."""
    metadata = {"meaning": meaning, "unit": unit, "bounds": Bounds(right, **bounds) if bounds else None}
    return field(default=default, metadata=metadata)


def section(meaning: str, kind=None):
    """A field that is a section: one with defaults of its own, or (kind None) one that may be left out."""
    metadata = {"meaning": meaning, "unit": "", "bounds": None}
    return field(default=None, metadata=metadata) if kind is None else field(default_factory=kind, metadata=metadata)


class Section:
    """A section of a recipe: checks the bounds of its fields, then `relations`, what holds between several of them."""

    def __post_init__(self):
        for own in dataclasses.fields(self):
            bounds, value = own.metadata["bounds"], getattr(self, own.name)
            if bounds is not None and value is not None:
                held = all(map(bounds.hold, value)) if isinstance(value, tuple) else bounds.hold(value)
                _require(held, own.name, list(value) if isinstance(value, tuple) else value, bounds.right)
        self.relations()

    def relations(self):
        """Raise _Wrong where fields do not go together."""


HEAD = re.compile(r"L(\d+)H(\d+)")  # of k and v: its layer, and its number there
RATE = {"above": 0, "below": 1, "right": "a number between 0 and 1"}


@dataclass(frozen=True)
class Stage(Section):
    """The settings of one optimisation: AdamW with linear warm-up and cosine decay to a tenth of the learning rate."""

    steps: int = key("optimiser steps", least=1, right="a positive number of steps")
    batch_size: int = key(
        "global batch size, over all processes", unit="sequences", least=1, right="a positive number of sequences"
    )
    learning_rate: float = key("peak learning rate", **RATE)
    warmup_steps: int = key("steps of linear warm-up", 0, least=0, right="0 to steps")

    def relations(self):
        _require(self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"0 to steps ({self.steps})")


@dataclass(frozen=True, kw_only=True)
class TeacherTraining(Stage):
    """A teacher trained from scratch, with its own byte-level BPE tokenizer."""

    family: str = key("architecture: the model type of one of the families", families.TRAINED)
    hidden_size: int = key("channels of a layer", least=1, right="a positive number")
    num_layers: int = key("layers", least=1, right="a positive number")
    num_heads: int = key("attention heads of a layer", least=1, right="a positive number")
    num_key_value_heads: int | None = key(
        "heads of k and v, each shared by as many heads of q; null: num_heads", None, least=1, right="a positive number"
    )
    vocab_size: int = key(
        "tokens of the tokenizer",
        least=300,
        most=65536,
        right="300 to 65536 (256 bytes, special tokens and merges)",
    )

    def relations(self):
        super().relations()
        _require(
            self.family in families.MODEL_TYPES, "family", self.family, f"one of {', '.join(families.MODEL_TYPES)}"
        )
        heads, width, shared = self.num_heads, self.hidden_size, self.num_key_value_heads
        _require(width % heads == 0, "hidden_size", width, f"a multiple of num_heads ({heads})")
        even = f"heads of even width (rotary turns pairs of channels), not {width // heads}"
        _require(width // heads % 2 == 0, "num_heads", heads, even)
        _require(
            shared is None or heads % shared == 0,
            "num_key_value_heads",
            shared,
            f"a divisor of num_heads ({heads})",
        )


@dataclass(frozen=True)
class Teacher(Section):
    """The teacher: a local folder, else a Hub name, else one trained here, else the embedded one."""

    name: str | None = key("name on the Hub", None)
    revision: str | None = key("commit, tag or branch on the Hub", None)
    path: str | None = key("local checkpoint folder; takes precedence over name", None)
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = key(
        "dtype of the teacher's weights; auto: the checkpoint's own, float32 on a CPU", "auto"
    )
    allow_pickle: bool = key(
        "also load weights that are not safetensors; reading these runs code of whoever wrote them", False
    )
    trust_remote_code: bool = key(
        "run code that comes with the tokenizer; the model's code is transformers' own", False
    )
    train: TeacherTraining | None = section("train the teacher in this run")

    def relations(self):
        _require(
            self.train is None or not (self.name or self.path),
            "train",
            "a section",
            "either train or name/path, not both",
        )
        _require(
            self.revision is None or self.name is not None, "revision", self.revision, "a revision goes with a name"
        )
        _require(not _is_folder(self.name), "name", self.name, "a name on the Hub; a local folder goes into path")
        _require(
            self.path is None or (Path(self.path) / "config.json").is_file(),
            "path",
            self.path,
            "a folder with a checkpoint (config.json is missing)",
        )

    @property
    def folder(self):
        """The local folder of the teacher, or None where it lives on the Hub or is trained by the run."""
        if self.path is not None:
            return Path(self.path)
        return EMBEDDED_TEACHER if self.name is None and self.train is None else None


@dataclass(frozen=True)
class Data(Section):
    """The text: a local file or folder, else a Hub data set, else the source of the standard library."""

    name: str | None = key("data set on the Hub", None)
    subset: str | None = key("configuration of the data set", None)
    revision: str | None = key("commit, tag or branch of the data set", None)
    path: str | None = key("local file or folder of .txt, .md, .py, .jsonl, .json, .parquet or .arrow", None)
    text_column: str = key("column that holds the text", "text")
    chat_column: str | None = key(
        "column that holds conversations, lists of messages {role, content}, which go through the chat template of the "
        "teacher's tokenizer; null: text_column is read",
        None,
    )
    chat_loss: Literal["all", "assistant"] = key(
        "tokens that have a loss: all, or only those that the assistant wrote, with the end of its turn; all are read",
        "all",
    )
    context_length: int = key("length of a training example", 256, unit="tokens", least=8, right="8 tokens or more")
    evaluation_tokens: int = key("held-out text in each of validation and test", 65_536, unit="tokens")
    packing: Literal["stream", "documents"] = key(
        "stream: documents end to end, as Pythia read them; documents: each document starts a block, its last block is "
        "padded, and padding has no loss",
        "stream",
    )

    def relations(self):
        _require(
            self.evaluation_tokens >= self.context_length,
            "evaluation_tokens",
            self.evaluation_tokens,
            f"at least one context ({self.context_length})",
        )
        for name in ("subset", "revision"):
            value = getattr(self, name)
            _require(value is None or self.name is not None, name, value, f"a {name} goes with a name")
        _require(not _is_folder(self.name), "name", self.name, "a name on the Hub; a local folder goes into path")
        _require(
            self.chat_loss == "all" or self.chat_column is not None,
            "chat_loss",
            self.chat_loss,
            "all, or a chat_column: plain text has no assistant",
        )
        _require(
            self.chat_column is None or self.name is not None or self.path is not None,
            "chat_column",
            self.chat_column,
            "a name or path with it: the standard library has no conversations",
        )


@dataclass(frozen=True)
class Filter(Section):
    """The long filters of a student: implicit (arXiv:2302.10866, appendix), or modal from the start."""

    form: Literal["implicit", "modal", "positive"] = key(
        "implicit: a small network of the position; modal: poles; positive: sums of real exponentials, coefficients "
        "above zero, whose modes take half the bytes",
        "implicit",
    )
    filter_width: int = key("width of the implicit filter's network", 64, least=1, right="a positive width")
    position_features: int = key(
        "inputs of that network: time, and a sine and cosine for each frequency", 33, least=1, right="an odd number"
    )
    # The published Pile configuration has 14. At 1 the filters are smooth: in trials with the quickstart's teacher the
    # mean activation error after 205 thousand tokens was 0.22 instead of 0.46 (14 needed taps a tenth as large at the
    # start to come so far), and they take fewer modes.
    sine_frequency: float = key("frequency of the network's sine activations", 1.0, above=0, right="a positive number")
    window: float = key(
        "time after which the slowest filter has decayed to 1 % of its amplitude; the fastest takes a fifth of it",
        1.5,
        unit="contexts",
        above=0,
        right="a positive number of contexts",
    )
    state_size: int = key(
        "modes of a filter with form: modal or positive", 4, least=1, right="a positive number of modes"
    )
    hankel_penalty: float = key(
        "weight, in the loss of both steps, of the energy that `hankel_states` cannot reach",
        0.0,
        least=0,
        right="0 for none, or a positive weight",
    )
    hankel_states: int = key(
        "real states of the floor that is logged during training, and that the penalty acts on",
        8,
        least=1,
        right="a positive number of real states",
    )

    def relations(self):
        odd = "an odd number (time, and a sine and cosine for each frequency)"
        _require(self.position_features % 2 == 1, "position_features", self.position_features, odd)


@dataclass(frozen=True)
class Student(Section):
    """The mixers that replace attention, and their filters."""

    mixer: Literal["hyena", "multihyena", "window"] = key(
        "hyena: a filter per channel; multihyena: per head; window: none, attention in a window alone", "multihyena"
    )
    window: int = key(
        "softmax attention of each head beside its filters, whose lags begin where it ends; 0: none",
        0,
        unit="tokens",
        least=0,
        right="a number of tokens, or 0 for none",
    )
    features: Literal["none", "hedgehog"] = key(
        "hedgehog: the filters' scores are products of non-negative features of q and k, and are normalised", "none"
    )
    hyena_order: int = key(
        "hyena: long convolutions of a layer; 1 is gated before and after, 2 and more is the paper's recurrence",
        1,
        least=1,
        most=8,
        right="1 to 8 long convolutions",
    )
    num_filter_heads: int | None = key(
        "multihyena: filters per layer; null: one for each of the teacher's heads of k and v (share_state), else of q",
        None,
        least=1,
        right="a positive number of filters",
    )
    share_state: bool = key(
        "heads of q that share a head of k and v share its filters and its state; false: each has its own", True
    )
    rotary: bool = key("keep the teacher's rotary turn of q and k, where filter groups split no turned pair", True)
    attention_layers: tuple[int, ...] = key("layers that keep the teacher's attention, counted from 0", ())
    attention_heads: tuple[str, ...] = key(
        "single heads of k and v that keep the teacher's attention, as L2H3: layer 2, head 3, both counted from 0", ()
    )
    attention_window: int | None = key(
        "window of a kept layer; null: the context length; 0: no window, the state grows",
        None,
        unit="tokens",
        least=0,
        right="a number of tokens, or 0 for no window",
    )
    short_filter_length: int = key(
        "taps of the short convolutions of q, k and v", 3, least=1, most=16, right="1 to 16 taps"
    )
    filter: Filter = section("the long filters", Filter)

    def relations(self):
        _require(
            self.hyena_order == 1 or self.mixer == "hyena",
            "hyena_order",
            self.hyena_order,
            "1: the full recurrence works on single channels; it goes with hyena",
        )
        _require(
            self.num_filter_heads is None or self.mixer == "multihyena",
            "num_filter_heads",
            self.num_filter_heads,
            "no value: only multihyena takes one; hyena has a filter for each channel, window has none",
        )
        names = list(self.attention_heads)
        _require(all(map(HEAD.fullmatch, names)), "attention_heads", names, "heads as L2H3: layer 2, head 3, from 0")
        _require(len(set(self.kept_heads)) == len(names), "attention_heads", names, "each head once")
        _require(
            not {layer for layer, _ in self.kept_heads} & set(self.attention_layers),
            "attention_heads",
            names,
            f"no head of attention_layers {list(self.attention_layers)}, which keep all of theirs",
        )
        _require(
            not names or self.mixer != "hyena",
            "attention_heads",
            names,
            "none with hyena, whose filters split the turned pairs of q and k; they go with multihyena",
        )
        _require(
            self.window > 0 or self.mixer != "window", "window", 0, "a number of tokens: with mixer: window it is all"
        )
        _require(
            self.window == 0 or self.mixer != "hyena",
            "window",
            self.window,
            "0: it goes with multihyena, whose filters run over the turned pairs of q and k that the window takes",
        )
        _require(self.window == 0 or self.rotary, "rotary", False, "true: a window takes the teacher's turn of q and k")
        _require(
            self.features == "none"
            or (self.mixer == "multihyena" and self.num_filter_heads is None and self.filter.form == "positive"),
            "features",
            self.features,
            "none, or multihyena with a filter for each head and filter.form: positive, as the normaliser needs",
        )

    @property
    def kept_heads(self) -> tuple[tuple[int, int], ...]:
        """`attention_heads` as numbers: layer, head of k and v."""
        found = (HEAD.fullmatch(name).groups() for name in self.attention_heads)
        return tuple((int(layer), int(head)) for layer, head in found)


@dataclass(frozen=True, kw_only=True)
class Activations(Stage):
    """Step one: match each mixer to the teacher's attention; only mixers are trained."""

    schedule: Literal["parallel", "progressive", "joint"] = key(
        "parallel: each layer reads the teacher's activations; progressive: layer by layer from the bottom, on the "
        "student's own; joint: all layers at once on the student's own",
        "parallel",
    )
    flat: float | None = key(
        "end early once the held-out error falls by less than this share between two looks",
        None,
        above=0,
        below=1,
        right="a share between 0 and 1",
    )
    look_every: int = key(
        "steps between two measurements of the held-out error for `flat`",
        50,
        least=1,
        right="a positive number of steps",
    )


@dataclass(frozen=True, kw_only=True)
class Logits(Stage):
    """Step two: match the teacher's distribution."""

    trained: Literal["mixers", "everything"] = key("which parameters are trained", "everything")
    rest_learning_rate: float | None = key(
        "learning rate outside the mixers (kept attention is a mixer); null: the same", None, **RATE
    )
    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = key("divergence", "forward_kl")
    temperature: float = key(
        "temperature of both distributions; the loss is multiplied by its square",
        1.0,
        above=0,
        right="a positive number",
    )
    cross_entropy: float = key(
        "weight c of the cross-entropy: loss = (1 - c) objective + c cross-entropy",
        0.0,
        least=0,
        below=1,
        right="a share, 0 up to but not 1",
    )
    hidden_states: float = key(
        "weight of the mean relative error of the blocks' outputs against the teacher's",
        0.0,
        least=0,
        right="0 for none, or a positive weight",
    )

    def relations(self):
        super().relations()
        _require(
            self.rest_learning_rate is None or self.trained == "everything",
            "rest_learning_rate",
            self.rest_learning_rate,
            "nothing where only mixers are trained",
        )


@dataclass(frozen=True)
class Transfer(Section):
    """Stage one: activations, then logits; each a section, or a list of sections that follow one another."""

    activations: tuple[Activations, ...] = key("step one")
    logits: tuple[Logits, ...] = key("step two")

    def relations(self):
        for name in ("activations", "logits"):
            _require(len(getattr(self, name)) > 0, name, [], "a section, or a list of them")

    @property
    def phases(self) -> tuple[Stage, ...]:
        """All of both, in order."""
        return self.activations + self.logits


@dataclass(frozen=True)
class Cache(Section):
    """The teacher's outputs on disk, so that several passes, seeds and students need its forward pass once."""

    folder: str = key("shared by runs; subfolders are named by a hash of teacher, text and length", "cache")
    logits: int | None = key(
        "most likely tokens kept at each position, with the mass of the rest",
        None,
        unit="tokens",
        least=1,
        right="a positive number of tokens",
    )
    activations: bool = key("keep the inputs and outputs of every attention layer, in 16 bits", False)

    def relations(self):
        _require(self.folder != "", "folder", self.folder, "a folder")
        _require(
            self.activations or self.logits is not None,
            "logits",
            self.logits,
            "a number of tokens to keep, or activations: true: the section keeps nothing",
        )


@dataclass(frozen=True)
class Baseline(Section):
    """The same student from scratch, on the tokens that transfer read, in the same batches and order."""

    learning_rate: float = key("peak learning rate", **RATE)
    warmup_steps: int = key("steps of linear warm-up", 0, least=0, right="0 or more")


@dataclass(frozen=True)
class Recurrence(Section):
    """Stage two: the smallest state whose taps meet the tolerance, or the best use of a number of bytes."""

    method: Literal["balanced", "irka", "projection", "positive"] = key(
        "how poles are found; positive: real poles with residues of 0 or more, for filters whose taps are positive; "
        "the tolerance is then relative to each tap",
        "irka",
    )
    tolerance: float = key(
        "relative l2 error of each filter's taps", 1e-2, above=0, below=1, right="a relative error between 0 and 1"
    )
    state_bytes: int | None = key(
        "budget for a sequence's state, with short convolutions and kept attention; replaces the tolerance",
        None,
        unit="bytes",
        least=1,
        right="a positive number of bytes",
    )
    dtype: Literal["float32", "bfloat16", "float16"] = key(
        "dtype of decoding, in which the budget counts windows and short convolutions; modes are in float32", "float32"
    )
    max_state_size: int = key("most complex modes of a filter", 32, least=1, right="a positive number of modes")
    horizon: int | None = key(
        "taps to match; null: the context length", None, unit="tokens", least=8, right="8 taps or more"
    )

    @property
    def itemsize(self) -> int:
        """Bytes of a number of `dtype`."""
        return 4 if self.dtype == "float32" else 2

    @classmethod
    def from_command_line(cls, **given):
        """The same from `scavenger recur`, with the same words for a mistake."""
        try:
            return cls(**given)
        except _Wrong as wrong:
            option = "--" + wrong.key.replace("_", "-")
            raise RecipeError(f"{option}: found {_show(wrong.found)}; expected {wrong.right}") from None


@dataclass(frozen=True)
class Report(Section):
    """What is measured at the end of a run."""

    context_lengths: tuple[int, ...] = key(
        "context lengths after which speed and state of one sequence are measured",
        (256, 2048),
        unit="tokens",
        least=2,
        right="a list of lengths of 2 tokens or more",
    )
    cases: tuple[str, ...] = key("BATCHxPROMPT+NEW, as 64x512+256, whose throughput is measured as well", ())
    rounds: int = key("interleaved rounds of all timings", 5, least=1, right="a positive number")
    examples: int = key(
        "sequences of each kind of recall, at each distance in a context", 64, least=1, right="a positive number"
    )
    prompts: int = key("held-out prompts that every model continues", 16, least=1, right="a positive number")
    sample_tokens: int = key(
        "length of these continuations", 96, unit="tokens", least=4, right="4 or more, to look for repetitions"
    )
    tasks: tuple[str, ...] = key("lm-eval tasks (the extra `eval`)", ())
    tasks_path: str | None = key("folder with the tasks' documents; null: the Hub", None)
    task_files: tuple[str, ...] = key("folders with lm-eval task files that read them, as eval/tasks", ())
    task_limit: int | None = key("questions of each task; null: all", None, least=1, right="a positive number")

    def relations(self):
        lengths = list(self.context_lengths)
        _require(len(lengths) > 0, "context_lengths", lengths, "a list of lengths of 2 tokens or more")
        for case in self.cases:
            right = "BATCHxPROMPT+NEW with prompts of 2 tokens or more, such as 64x512+256"
            found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", case)
            batch, prompt, new = map(int, found.groups()) if found else (0, 0, 0)
            _require(batch > 0 and prompt > 1 and new > 0, "cases", case, right)


@dataclass(frozen=True)
class Training(Section):
    """What every optimisation shares: logging and checkpoints."""

    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = key("where the log goes", "tensorboard")
    log_every: int = key("steps between two entries of the log", 10, least=1, right="a positive number of steps")
    checkpoint_every: int = key("steps between two checkpoints", 200, least=1, right="a positive number of steps")
    accumulate: int = key(
        "micro-batches of a process's share of a batch", 1, least=1, right="a positive number of parts"
    )
    compile: bool = key(
        "torch.compile a student's mixers and MLPs: some minutes at the start, then fewer kernels a step", False
    )
    checkpoint_activations: bool = key(
        "keep only the inputs of layers for the backward pass, which computes them again: less memory, more time",
        False,
    )
    energy: bool = key("measure energy and CO2 of each stage with codecarbon", False)

    def relations(self):
        _require(
            self.checkpoint_every % self.log_every == 0,
            "checkpoint_every",
            self.checkpoint_every,
            f"a multiple of log_every ({self.log_every}), so that a resumed run logs the same means",
        )


@dataclass(frozen=True)
class Hub(Section):
    """Where on the Hub the finished student is pushed; without this section nothing leaves the machine."""

    name: str = key("repository, as user/repo")
    private: bool = key("make a private repository; false: the account's default, usually public", False)
    revision: str | None = key("branch, created if needed; null: main", None)

    def relations(self):
        from huggingface_hub.errors import HFValidationError
        from huggingface_hub.utils import validate_repo_id

        try:
            validate_repo_id(self.name)
            valid = "/" in self.name
        except HFValidationError:
            valid = False
        _require(valid, "name", self.name, "user/repo: letters, digits, - _ and .")
        # What git takes as a branch and a shell as one word.
        _require(
            self.revision is None
            or re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)*", self.revision)
            and ".." not in self.revision
            and not self.revision.endswith((".", ".lock"))
            and not self.revision.startswith("refs/"),
            "revision",
            self.revision,
            "the name of a branch",
        )

    @classmethod
    def from_command_line(cls, name: str, private: bool, revision: str | None):
        """The same from `scavenger push`, with the same words for a mistake."""
        try:
            return cls(name, private, revision)
        except _Wrong as wrong:
            option = "--to" if wrong.key == "name" else f"--{wrong.key}"
            raise RecipeError(f"{option}: found {_show(wrong.found)}; expected {wrong.right}") from None


@dataclass(frozen=True)
class Recipe(Section):
    """One experiment. The stage of a section that is left out is not run."""

    run_dir: str = key("folder of the run")
    seed: int = key("seed of weights, order of the text, and measurements", 0, least=0, right="0 or more")
    teacher: Teacher = section("the teacher", Teacher)
    data: Data = section("the text", Data)
    student: Student = section("the student", Student)
    training: Training = section("logging and checkpoints of every optimisation", Training)
    cache: Cache | None = section("the teacher's outputs on disk")
    transfer: Transfer | None = section("stage one")
    baseline: Baseline | None = section("the student from scratch, for comparison")
    recurrence: Recurrence | None = section("stage two")
    report: Report | None = section("measurements, table and page at the end")
    hub: Hub | None = section("push to the Hub")

    def relations(self):
        _require(self.run_dir != "", "run_dir", self.run_dir, "a folder for the run")
        for name in ("cache", "baseline", "recurrence", "report", "hub"):
            _require(
                getattr(self, name) is None or self.transfer is not None,
                name,
                "a section",
                "nothing, or a transfer section before it",
            )
        _require(
            self.transfer is not None or self.teacher.train is not None,
            "transfer",
            None,
            "a transfer section, or teacher.train: without them the recipe makes nothing",
        )
        _require(
            self.data.chat_column is None or self.teacher.train is None,
            "data.chat_column",
            self.data.chat_column,
            "nothing with teacher.train: the tokenizer made there has no chat template",
        )
        _require(
            self.recurrence is None or self.student.features == "none" or self.recurrence.method == "positive",
            "recurrence.method",
            self.recurrence.method if self.recurrence else None,
            "positive with student.features: a normaliser needs positive filters",
        )
        for phase in self.transfer.activations if self.transfer else ():
            _require(
                phase.flat is None or phase.look_every % self.training.log_every == 0,
                "transfer.activations.look_every",
                phase.look_every,
                f"a multiple of training.log_every ({self.training.log_every}): a look is an entry of the log",
            )
        for phase in self.transfer.logits if self.cache is not None and self.cache.logits is not None else ():
            _require(
                phase.temperature == 1 and phase.hidden_states == 0,
                "cache.logits",
                self.cache.logits,
                "nothing, where transfer.logits has a temperature other than 1 or a weight of hidden_states: what is "
                "kept is the distribution at temperature 1 and no hidden state",
            )
        if self.baseline is not None:
            steps = sum(phase.steps for phase in self.transfer.phases)
            _require(
                self.baseline.warmup_steps <= steps,
                "baseline.warmup_steps",
                self.baseline.warmup_steps,
                f"0 to the steps of transfer ({steps})",
            )
        _require(
            # Once its tokens are in the run, the text is not read again.
            self.data.path is None or Path(self.data.path).exists() or (Path(self.run_dir) / "data").is_dir(),
            "data.path",
            self.data.path,
            "an existing file or folder of .txt, .md, .py, .jsonl, .json, .parquet or .arrow",
        )
        layers = teacher_layers(self)
        if layers is not None:
            self.fit(layers)

    def fit(self, layers: int):
        """Raise _Wrong where the recipe does not fit a teacher of so many layers."""
        for phase in self.transfer.activations if self.transfer is not None else ():
            _require(
                phase.schedule != "progressive" or phase.steps >= layers,
                "transfer.activations.steps",
                phase.steps,
                f"at least one step for each of the teacher's {layers} layers, one after the other",
            )
        kept = set(self.student.attention_layers)
        _require(
            self.student.window < self.data.context_length,
            "student.window",
            self.student.window,
            f"less than data.context_length ({self.data.context_length})",
        )
        _require(
            self.recurrence is None or self.student.mixer != "window",
            "recurrence",
            "a section",
            "nothing with student.mixer: window, which has no filters and is a recurrence already",
        )
        _require(
            self.transfer is None or (all(0 <= layer < layers for layer in kept) and len(kept) < layers),
            "student.attention_layers",
            list(self.student.attention_layers),
            f"some, not all, of the teacher's layers 0 to {layers - 1}",
        )
        _require(
            self.transfer is None or all(layer < layers for layer, _ in self.student.kept_heads),
            "student.attention_heads",
            list(self.student.attention_heads),
            f"heads of the teacher's layers 0 to {layers - 1}",
        )


def load_recipe(path: str, overrides: list[str] = ()) -> Recipe:
    """Read a recipe file and apply overrides of the form `section.key=value`.

    Raises RecipeError, one line, for an unreadable file, broken YAML, an unknown key, a value of the wrong type or
    an impossible value.
    """
    values = _read(path)
    for override in overrides:
        _override(values, override, path)
    try:
        return _build(Recipe, values, "")
    except _Wrong as wrong:
        raise RecipeError(f"{path}: {wrong.key}: found {_show(wrong.found)}; expected {wrong.right}") from None


def require_layers(recipe: Recipe, layers: int):
    """Raise RecipeError where the recipe does not fit a teacher of so many layers, as is known once it is loaded."""
    try:
        recipe.fit(layers)
    except _Wrong as wrong:
        raise RecipeError(f"{wrong.key}: found {_show(wrong.found)}; expected {wrong.right}") from None


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; itself a recipe."""
    return "#!/usr/bin/env scavenger\n" + yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def differences(saved: str, recipe: Recipe) -> list[str]:
    """The keys in which a saved, resolved recipe and this one differ, with both values.

    `hub` is left out: where a student goes changes nothing of what it is.
    """
    before, after = _without_removed(yaml.safe_load(saved)), _flat(yaml.safe_load(resolved(recipe)))
    try:  # a key that came after the run was started has its default there
        before = _flat(yaml.safe_load(resolved(_build(Recipe, before, ""))))
    except _Wrong:
        before = _flat(before)
    return [
        f"{key} (the run has {_show(before.get(key))}, the recipe says {_show(after.get(key))})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] != "hub"
    ]


def teacher_layers(recipe: Recipe) -> int | None:
    """The number of the teacher's layers as far as it is known without the network; None for a Hub name."""
    folder = recipe.teacher.folder
    if recipe.teacher.train is not None:
        return recipe.teacher.train.num_layers
    if folder is None:
        return None
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _Wrong("teacher.path", str(folder), "a folder whose config.json can be read") from None
    kind = shape.get("model_type") if isinstance(shape, dict) else None
    _require(
        kind in families.MODEL_TYPES,
        "teacher.path",
        f"{folder} (model_type {kind})",
        f"a checkpoint of one of the families {', '.join(families.MODEL_TYPES)}",
    )
    layers = shape.get("num_hidden_layers")
    if not isinstance(layers, int):
        raise _Wrong("teacher.path", str(folder), "a folder whose config.json gives num_hidden_layers")
    return layers


def _without_removed(values):
    """A saved recipe without the keys of REMOVED that have the value there."""
    for name, value in REMOVED.items():
        *sections, last = name.split(".")
        part = values
        for section_name in sections:
            part = part.get(section_name) or {} if isinstance(part, dict) else {}
        if isinstance(part, dict) and part.get(last) == value:
            del part[last]
    return values


def _is_folder(name):
    return name is not None and (name[:1] in ("/", ".", "~") or Path(name).is_dir())


def _read(path):
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise RecipeError(f"{path}: no such recipe; expected a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read ({error}); expected a YAML file") from None
    try:
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: what looks like a date and is none
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "cannot be parsed"
        raise RecipeError(f"{path}: broken YAML{where}: {problem}; expected `key: value` lines") from None
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: found {_show(values)}; expected sections such as `teacher:` and `transfer:`")
    return values


def _override(values, override, path):
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RecipeError(f"{path}: override {override!r}; expected section.key=value, as transfer.logits.steps=100")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError):
        raise RecipeError(
            f"{path}: override {override!r}: the value is broken YAML; expected section.key=value"
        ) from None
    *sections, last = key.split(".")
    for section in sections:
        if isinstance(values, list):  # a section that is a list of them: counted from 0
            if not (section.isdigit() and int(section) < len(values)):
                raise RecipeError(
                    f"{path}: override {override!r}: found {section}; expected a number from 0 to {len(values) - 1}"
                )
            values = values[int(section)]
        else:
            if values.get(section) is None:
                values[section] = {}
            values = values[section]
        if not isinstance(values, (dict, list)):
            raise RecipeError(f"{path}: override {override!r}: {section} is not a section")
    if isinstance(values, list):
        raise RecipeError(
            f"{path}: override {override!r}: found a list of sections; expected {'.'.join(sections)}.0.{last}"
        )
    values[last] = value


def _build(kind, values, where):
    """An instance of dataclass `kind` from a mapping; `where` is the dotted path that messages name."""
    if not isinstance(values, dict):
        raise _Wrong(where or "recipe", values, "a section of `key: value` lines")
    fields = {f.name: f for f in dataclasses.fields(kind)}
    prefix = where + "." if where else ""
    for key in values:
        removed = REMOVED.get(prefix + str(key))
        right = f"no such line: {removed} is what the code does"
        _require(removed is None, prefix + str(key), "a key of an earlier version", right)
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            right = f"`{near[0]}`" if near else "one of " + ", ".join(fields)
            raise _Wrong(prefix + str(key), "an unknown key", right)
    hints = typing.get_type_hints(kind)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Wrong(prefix + name, "nothing", describe(hints[name]))
    made = {key: _convert(hints[key], value, prefix + key) for key, value in values.items()}
    try:
        return kind(**made)
    except _Wrong as wrong:
        raise _Wrong(prefix + wrong.key, wrong.found, wrong.right) from None


def _convert(hint, value, where):
    """`value` as the annotated type; YAML 1.1 reads 1e-3 as text, so text that is a number counts as one."""
    if isinstance(hint, types.UnionType):
        if value is None:
            return None
        hint = next(kind for kind in typing.get_args(hint) if kind is not types.NoneType)
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    if typing.get_origin(hint) is Literal:
        choices = typing.get_args(hint)
        if value is None and "none" in choices:
            value = "none"
        if value not in choices:
            near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
            hint_text = f" (did you mean {near[0]}?)" if near else ""
            raise _Wrong(where, value, "one of " + ", ".join(choices) + hint_text)
        return value
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(kind) and not isinstance(value, list):
            return (_build(kind, value, where),)  # one section is a list of one
        if not isinstance(value, list):
            raise _Wrong(where, value, describe(hint))
        several = dataclasses.is_dataclass(kind) and len(value) > 1
        return tuple(_convert(kind, item, f"{where}.{i}" if several else where) for i, item in enumerate(value))
    if hint in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        # A number that is not finite, or an int with a fraction, is nobody's intention.
        if number is None or number - number != 0 or (hint is int and number != int(number)):
            raise _Wrong(where, value, describe(hint))
        return hint(number) if hint is float or not isinstance(value, int) else value
    if not isinstance(value, hint):
        raise _Wrong(where, value, describe(hint))
    return value


def describe(hint) -> str:
    """A type in words."""
    if isinstance(hint, types.UnionType):
        return " or ".join(describe(kind) for kind in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        required = [f.name for f in dataclasses.fields(hint) if f.default is dataclasses.MISSING]
        return "a section" + (" with " + ", ".join(required) if required else "")
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(kind):
            return describe(kind) + ", or a list of them"
        return "a list of words" if kind is str else "a list of whole numbers"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text", types.NoneType: "null"}[hint]


def _show(value):
    if isinstance(value, str) and " " in value:
        return value
    if isinstance(value, dict):
        return "a section"
    return json.dumps(value, default=str)


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        items = [_plain(item) for item in value]
        return items[0] if len(items) == 1 and isinstance(items[0], dict) else items
    return value


def _flat(values, prefix=""):
    flat = {}
    for key, value in (values or {}).items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            value = dict(enumerate(value))
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
