"""A recipe: one YAML file, one frozen dataclass per section, nothing left to guess.

A section has the name of the module that reads it. Loading touches no file but the recipe and the folders it
names, and imports neither torch nor transformers, so a mistake is answered at once.
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


EMBEDDED_TEACHER = Path(__file__).parent / "assets" / "teacher-stdlib"

# Published shapes (config.json of each model), so that a plan needs no network.
PYTHIA_SHAPES = {
    f"EleutherAI/pythia-{size}{suffix}": {
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "rotary_pct": 0.25,
    }
    for size, width, layers, heads in [
        ("14m", 128, 6, 4),
        ("70m", 512, 6, 8),
        ("160m", 768, 12, 12),
        ("410m", 1024, 24, 16),
        ("1b", 2048, 16, 8),
    ]
    for suffix in ("", "-deduped")
}


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
class Stage:
    """One optimisation: AdamW with linear warm-up and cosine decay."""

    steps: int
    batch_size: int  # sequences per step, over all processes
    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self):
        _require(self.steps > 0, "steps", self.steps, "a positive number of steps")
        _require(self.batch_size > 0, "batch_size", self.batch_size, "a positive number of sequences")
        _require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "a number between 0 and 1")
        _require(0 <= self.warmup_steps <= self.steps, "warmup_steps", self.warmup_steps, f"0 to steps ({self.steps})")


@dataclass(frozen=True, kw_only=True)
class TeacherTraining(Stage):
    """A GPT-NeoX from scratch, with a byte-level BPE tokenizer of its own."""

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int

    def __post_init__(self):
        super().__post_init__()
        for key in ("hidden_size", "num_layers", "num_heads"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "a positive number")
        _require(
            self.hidden_size % self.num_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of num_heads ({self.num_heads})",
        )
        _require(
            self.hidden_size // self.num_heads % 2 == 0,
            "num_heads",
            self.num_heads,
            f"heads of even width (rotary turns pairs of channels), not {self.hidden_size // self.num_heads}",
        )
        _require(
            300 <= self.vocab_size <= 65536,
            "vocab_size",
            self.vocab_size,
            "300 to 65536 (256 bytes, special tokens and merges)",
        )


@dataclass(frozen=True)
class Teacher:
    """Which GPT-NeoX: a local folder, else a Hub name, else one trained here, else the embedded one."""

    name: str | None = None
    revision: str | None = None
    path: str | None = None
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = "auto"  # auto: the checkpoint's own; float32 on a CPU
    allow_pickle: bool = False  # weights that are no safetensors run code of whoever wrote them when they are read
    trust_remote_code: bool = False  # of the tokenizer; the model's code is transformers' own
    train: TeacherTraining | None = None

    def __post_init__(self):
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
        if self.path is not None:
            _require(
                (Path(self.path) / "config.json").is_file(),
                "path",
                self.path,
                "a folder with a GPT-NeoX checkpoint (config.json is missing)",
            )

    @property
    def folder(self):
        """The local folder of the teacher, or None where it lives on the Hub or is trained by the run."""
        if self.path is not None:
            return Path(self.path)
        return EMBEDDED_TEACHER if self.name is None and self.train is None else None


@dataclass(frozen=True)
class Data:
    """Which text: a local file or folder, else a Hub data set, else the standard library's own source."""

    name: str | None = None
    subset: str | None = None
    revision: str | None = None
    path: str | None = None
    text_column: str = "text"
    context_length: int = 256  # tokens per training example
    evaluation_tokens: int = 65_536  # held-out tokens, in each of validation and test
    # stream: documents end to end, as Pythia read them. documents: each begins a block, its last one is padded, and no
    # loss is taken on the padding.
    packing: Literal["stream", "documents"] = "stream"

    def __post_init__(self):
        _require(self.context_length >= 8, "context_length", self.context_length, "8 tokens or more")
        _require(
            self.evaluation_tokens >= self.context_length,
            "evaluation_tokens",
            self.evaluation_tokens,
            f"at least one context ({self.context_length})",
        )
        for key in ("subset", "revision"):
            _require(
                getattr(self, key) is None or self.name is not None,
                key,
                getattr(self, key),
                f"a {key} goes with a name",
            )
        _require(not _is_folder(self.name), "name", self.name, "a name on the Hub; a local folder goes into path")


@dataclass(frozen=True)
class Filter:
    """The long filters of a student: implicit (arXiv:2302.10866, appendix), or modal from the start."""

    form: Literal["implicit", "modal"] = "implicit"
    filter_width: int = 64
    position_features: int = 33
    # The published Pile configuration has 14. At 1 the filters are smooth: in trials with the quickstart's teacher the
    # mean activation error after 205 thousand tokens was 0.22 instead of 0.46 (14 needed taps a tenth as large at the
    # start to come so far), and they take fewer modes.
    sine_frequency: float = 1.0
    window: float = 1.5  # contexts after which the slowest filter has 1 % of its amplitude left, the fastest in a fifth
    state_size: int = 4  # complex modes of a filter that is modal from the start
    hankel_penalty: float = 0.0  # weight, in the loss of both steps, of the energy that `hankel_states` cannot reach
    hankel_states: int = 8  # real states of the floor that is watched while training, and pressed on by the penalty

    def __post_init__(self):
        _require(self.filter_width > 0, "filter_width", self.filter_width, "a positive width")
        _require(
            self.position_features > 0 and self.position_features % 2 == 1,
            "position_features",
            self.position_features,
            "an odd number (time, and a sine and cosine for each frequency)",
        )
        _require(self.sine_frequency > 0, "sine_frequency", self.sine_frequency, "a positive number")
        _require(self.window > 0, "window", self.window, "a positive number of contexts")
        _require(self.state_size > 0, "state_size", self.state_size, "a positive number of modes")
        _require(self.hankel_penalty >= 0, "hankel_penalty", self.hankel_penalty, "0 for none, or a positive weight")
        _require(self.hankel_states > 0, "hankel_states", self.hankel_states, "a positive number of real states")


@dataclass(frozen=True)
class Student:
    """The mixer in place of attention, and its filters."""

    mixer: Literal["hyena", "multihyena"] = "multihyena"
    hyena_order: int = 1  # hyena: long convolutions of a layer; 1 is gated before and after, from 2 on as in the paper
    num_filter_heads: int | None = None  # multihyena: filters per layer; None: the teacher's heads
    rotary: bool = True  # keep the teacher's rotary turn of q and k, where groups of channels split no turned pair
    attention_layers: tuple[int, ...] = ()  # layers that keep the teacher's attention, counted from 0
    attention_window: int | None = None  # tokens that such a layer sees; None: the context length; 0: all, without end
    short_filter_length: int = 3
    filter: Filter = field(default_factory=Filter)

    def __post_init__(self):
        _require(
            self.attention_window is None or self.attention_window >= 0,
            "attention_window",
            self.attention_window,
            "a number of tokens, or 0 for no window",
        )
        _require(1 <= self.hyena_order <= 8, "hyena_order", self.hyena_order, "1 to 8 long convolutions")
        _require(
            self.hyena_order == 1 or self.mixer == "hyena",
            "hyena_order",
            self.hyena_order,
            "1: the full recurrence works on single channels; it goes with hyena",
        )
        _require(1 <= self.short_filter_length <= 16, "short_filter_length", self.short_filter_length, "1 to 16 taps")
        _require(
            self.num_filter_heads is None or self.num_filter_heads > 0,
            "num_filter_heads",
            self.num_filter_heads,
            "a positive number of filters",
        )
        _require(
            self.num_filter_heads is None or self.mixer == "multihyena",
            "num_filter_heads",
            self.num_filter_heads,
            "nothing: hyena has one filter per channel; it goes with multihyena",
        )


@dataclass(frozen=True, kw_only=True)
class Activations(Stage):
    """Match each mixer to the teacher's attention; mixers only."""

    # parallel: each layer reads the teacher's activations. progressive: one layer after the other, from the bottom, on
    # the student's own. joint: all at once, on the student's own.
    schedule: Literal["parallel", "progressive", "joint"] = "parallel"
    # Ends a turn early: since the last look the held-out error fell by less than this share of itself.
    flat: float | None = None
    look_every: int = 50  # steps between two looks at held-out text, where `flat` asks for them

    def __post_init__(self):
        super().__post_init__()
        _require(self.flat is None or 0 < self.flat < 1, "flat", self.flat, "a share between 0 and 1")
        _require(self.look_every > 0, "look_every", self.look_every, "a positive number of steps")


@dataclass(frozen=True, kw_only=True)
class Logits(Stage):
    """Match the teacher's distribution."""

    trained: Literal["mixers", "everything"] = "everything"
    rest_learning_rate: float | None = None  # of all that is no mixer (kept attention is one); None: the same
    objective: Literal["forward_kl", "reverse_kl", "jensen_shannon"] = "forward_kl"
    temperature: float = 1.0  # of both distributions; the loss is multiplied by its square
    cross_entropy: float = 0.0  # loss = (1 - cross_entropy) objective + cross_entropy CE
    hidden_states: float = 0.0  # weight of the mean relative error of the blocks' outputs against the teacher's

    def __post_init__(self):
        super().__post_init__()
        _require(0 <= self.cross_entropy < 1, "cross_entropy", self.cross_entropy, "a share, 0 up to but not 1")
        _require(self.temperature > 0, "temperature", self.temperature, "a positive number")
        _require(self.hidden_states >= 0, "hidden_states", self.hidden_states, "0 for none, or a positive weight")
        _require(
            self.rest_learning_rate is None or 0 < self.rest_learning_rate < 1,
            "rest_learning_rate",
            self.rest_learning_rate,
            "a number between 0 and 1",
        )
        _require(
            self.rest_learning_rate is None or self.trained == "everything",
            "rest_learning_rate",
            self.rest_learning_rate,
            "nothing where only mixers are trained",
        )


@dataclass(frozen=True)
class Transfer:
    """Stage one: activations, then logits; each a section, or a list of sections that follow one another."""

    activations: tuple[Activations, ...]
    logits: tuple[Logits, ...]

    def __post_init__(self):
        for key in ("activations", "logits"):
            _require(len(getattr(self, key)) > 0, key, [], "a section, or a list of them")

    @property
    def phases(self) -> tuple[Stage, ...]:
        """All of both, in order."""
        return self.activations + self.logits


@dataclass(frozen=True)
class Cache:
    """The teacher's outputs on disk, so that several passes, seeds and students need its forward once."""

    folder: str = "cache"  # shared by runs: what lies there is named by a hash of teacher, text and length
    logits: int | None = None  # the most likely tokens kept at each position, with the mass of the rest
    activations: bool = False  # what every attention layer takes in and gives out, in float16

    def __post_init__(self):
        _require(self.folder != "", "folder", self.folder, "a folder")
        _require(self.logits is None or self.logits > 0, "logits", self.logits, "a positive number of tokens")
        _require(
            self.activations or self.logits is not None,
            "logits",
            self.logits,
            "a number of tokens to keep, or activations: true: the section keeps nothing",
        )


@dataclass(frozen=True)
class Baseline:
    """The same student from scratch on the tokens that transfer saw, in the same batches and order."""

    learning_rate: float
    warmup_steps: int = 0

    def __post_init__(self):
        _require(0 < self.learning_rate < 1, "learning_rate", self.learning_rate, "a number between 0 and 1")
        _require(self.warmup_steps >= 0, "warmup_steps", self.warmup_steps, "0 or more")


@dataclass(frozen=True)
class Recurrence:
    """Stage two: the smallest state whose taps meet the tolerance, or the best use of a number of bytes."""

    method: Literal["balanced", "irka", "projection", "gradient"] = "irka"
    tolerance: float = 1e-2  # relative l2 error of the taps, per filter
    state_bytes: int | None = None  # of a sequence, with short convolutions and kept attention; replaces the tolerance
    max_state_size: int = 32  # complex modes per filter
    horizon: int | None = None  # taps to match; None: the context length
    prefill_outputs: Literal["recurrent", "exact"] = "recurrent"  # a prompt's outputs: from the modes or the filters

    def __post_init__(self):
        _require(0 < self.tolerance < 1, "tolerance", self.tolerance, "a relative error between 0 and 1")
        _require(self.max_state_size > 0, "max_state_size", self.max_state_size, "a positive number of modes")
        _require(
            self.state_bytes is None or self.state_bytes > 0,
            "state_bytes",
            self.state_bytes,
            "a positive number of bytes",
        )
        _require(self.horizon is None or self.horizon >= 8, "horizon", self.horizon, "8 taps or more")

    @classmethod
    def from_command_line(cls, **given):
        """The same from `scavenger recur`, with the same words for a mistake."""
        try:
            return cls(**given)
        except _Wrong as wrong:
            option = "--" + wrong.key.replace("_", "-")
            raise RecipeError(f"{option}: found {_show(wrong.found)}; expected {wrong.right}") from None


@dataclass(frozen=True)
class Report:
    """What is measured when everything is made."""

    context_lengths: tuple[int, ...] = (256, 2048)  # after which the speed and state of one sequence are measured
    cases: tuple[str, ...] = ()  # BATCHxPROMPT+NEW, as 64x512+256, whose throughput is measured too
    rounds: int = 5  # of all timings, in turn
    examples: int = 64  # sequences of each kind of recall, at each distance
    prompts: int = 16  # held-out beginnings from which every model goes on
    sample_tokens: int = 96  # by so many tokens
    tasks: tuple[str, ...] = ()  # of lm-eval (the extra `eval`); their documents come from the Hub,
    tasks_path: str | None = None  # or from below this folder,
    task_files: tuple[str, ...] = ()  # where these folders have task files that read them, as eval/tasks
    task_limit: int | None = None  # questions of each task; None: all

    def __post_init__(self):
        _require(
            len(self.context_lengths) > 0 and min(self.context_lengths) > 1,
            "context_lengths",
            list(self.context_lengths),
            "a list of lengths of 2 tokens or more",
        )
        for case in self.cases:
            right = "BATCHxPROMPT+NEW with prompts of 2 tokens or more, such as 64x512+256"
            found = re.fullmatch(r"(\d+)x(\d+)\+(\d+)", case)
            batch, prompt, new = map(int, found.groups()) if found else (0, 0, 0)
            _require(batch > 0 and prompt > 1 and new > 0, "cases", case, right)
        for key in ("rounds", "examples", "prompts", "task_limit"):
            value = getattr(self, key)
            _require(value is None or value > 0, key, value, "a positive number")
        _require(self.sample_tokens >= 4, "sample_tokens", self.sample_tokens, "4 or more, to look for repetitions")


@dataclass(frozen=True)
class Training:
    """What every optimisation shares: logging and checkpoints."""

    tracker: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    log_every: int = 10  # steps
    checkpoint_every: int = 200  # steps
    accumulate: int = 1  # parts that a process takes its share of a batch in, one after the other
    energy: bool = False  # measure energy and CO2 of each stage with codecarbon

    def __post_init__(self):
        for key in ("log_every", "checkpoint_every"):
            _require(getattr(self, key) > 0, key, getattr(self, key), "a positive number of steps")
        _require(self.accumulate > 0, "accumulate", self.accumulate, "a positive number of parts")
        _require(
            self.checkpoint_every % self.log_every == 0,
            "checkpoint_every",
            self.checkpoint_every,
            f"a multiple of log_every ({self.log_every}), so that a resumed run logs the same means",
        )


@dataclass(frozen=True)
class Hub:
    """Where on the Hub the finished student goes; without this section nothing leaves the machine."""

    name: str
    private: bool = False  # False: as the account makes its repositories, which is public unless it says otherwise
    revision: str | None = None  # a branch, made where there is none; None: the main branch

    def __post_init__(self):
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
class Recipe:
    """One experiment. A section that is left out is a stage that is not run."""

    run_dir: str
    seed: int = 0
    teacher: Teacher = field(default_factory=Teacher)
    data: Data = field(default_factory=Data)
    student: Student = field(default_factory=Student)
    training: Training = field(default_factory=Training)
    cache: Cache | None = None
    transfer: Transfer | None = None
    baseline: Baseline | None = None
    recurrence: Recurrence | None = None
    report: Report | None = None
    hub: Hub | None = None

    def __post_init__(self):
        _require(self.run_dir != "", "run_dir", self.run_dir, "a folder for the run")
        _require(self.seed >= 0, "seed", self.seed, "0 or more")
        for section in ("cache", "baseline", "recurrence", "report", "hub"):
            _require(
                getattr(self, section) is None or self.transfer is not None,
                section,
                "a section",
                "nothing, or a transfer section before it",
            )
        _require(
            self.transfer is not None or self.teacher.train is not None,
            "transfer",
            None,
            "a transfer section, or teacher.train: the recipe makes nothing",
        )
        _require(
            self.recurrence is None
            or self.recurrence.prefill_outputs == "recurrent"
            or self.student.filter.form == "implicit",
            "recurrence.prefill_outputs",
            "exact",
            "recurrent: the student's filters are modal already",
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
            "an existing file or folder of .txt, .md, .py, .jsonl, .json or .parquet",
        )
        shape = teacher_shape(self)
        heads = self.student.num_filter_heads
        if self.transfer is not None and shape is not None:
            layers = shape["num_hidden_layers"]
            kept = set(self.student.attention_layers)
            for phase in self.transfer.activations:
                _require(
                    phase.schedule != "progressive" or phase.steps >= layers,
                    "transfer.activations.steps",
                    phase.steps,
                    f"at least one step for each of the teacher's {layers} layers, one after the other",
                )
            _require(
                all(0 <= layer < layers for layer in kept) and len(kept) < layers,
                "student.attention_layers",
                list(self.student.attention_layers),
                f"some, not all, of the teacher's layers 0 to {layers - 1}",
            )
        if self.transfer is not None and shape is not None and heads is not None:
            _require(
                shape["hidden_size"] % heads == 0,
                "student.num_filter_heads",
                heads,
                f"a divisor of the teacher's width ({shape['hidden_size']})",
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


def resolved(recipe: Recipe) -> str:
    """The recipe as YAML with every default written out; itself a recipe."""
    return "#!/usr/bin/env scavenger\n" + yaml.safe_dump(_plain(dataclasses.asdict(recipe)), sort_keys=False)


def differences(saved: str, recipe: Recipe) -> list[str]:
    """The keys in which a saved, resolved recipe and this one differ, with both values.

    `hub` is left out: where a student goes changes nothing of what it is.
    """
    before, after = yaml.safe_load(saved), _flat(yaml.safe_load(resolved(recipe)))
    try:  # a key that came after the run was started has its default there
        before = _flat(yaml.safe_load(resolved(_build(Recipe, before, ""))))
    except _Wrong:
        before = _flat(before)
    return [
        f"{key} (the run has {_show(before.get(key))}, the recipe says {_show(after.get(key))})"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key) and key.split(".")[0] != "hub"
    ]


def teacher_shape(recipe: Recipe) -> dict | None:
    """The teacher's config.json as far as it is known without the network; None for an unknown Hub name."""
    if recipe.teacher.train is not None:
        train = recipe.teacher.train
        return {
            "hidden_size": train.hidden_size,
            "num_hidden_layers": train.num_layers,
            "num_attention_heads": train.num_heads,
            "intermediate_size": 4 * train.hidden_size,
            "vocab_size": train.vocab_size,
            "max_position_embeddings": recipe.data.context_length,
        }
    folder = recipe.teacher.folder
    if folder is None:
        return PYTHIA_SHAPES.get(recipe.teacher.name)
    try:
        shape = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise _Wrong("teacher.path", str(folder), "a folder whose config.json can be read") from None
    needed = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
    if not isinstance(shape, dict) or (
        shape.get("model_type") == "gpt_neox" and not all(isinstance(shape.get(key), int) for key in needed)
    ):
        raise _Wrong("teacher.path", str(folder), "a folder whose config.json gives " + ", ".join(needed))
    _require(
        shape.get("model_type") == "gpt_neox",
        "teacher.path",
        f"{folder} (model_type {shape.get('model_type')})",
        "a GPT-NeoX checkpoint (model_type gpt_neox)",
    )
    return shape


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
            raise RecipeError(f"{path}: override {override!r}: {section} is no section")
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
        if key not in fields:
            near = difflib.get_close_matches(str(key), fields, n=1, cutoff=0.5)
            right = f"`{near[0]}`" if near else "one of " + ", ".join(fields)
            raise _Wrong(prefix + str(key), "an unknown key", right)
    hints = typing.get_type_hints(kind)
    for name, f in fields.items():
        if name not in values and f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise _Wrong(prefix + name, "nothing", _describe(hints[name]))
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
            raise _Wrong(where, value, _describe(hint))
        several = dataclasses.is_dataclass(kind) and len(value) > 1
        return tuple(_convert(kind, item, f"{where}.{i}" if several else where) for i, item in enumerate(value))
    if hint in (int, float):
        try:
            number = float(value) if not isinstance(value, bool) else None
        except (TypeError, ValueError, OverflowError):
            number = None
        # A number that is not finite, or an int with a fraction, is nobody's intention.
        if number is None or number - number != 0 or (hint is int and number != int(number)):
            raise _Wrong(where, value, _describe(hint))
        return hint(number) if hint is float or not isinstance(value, int) else value
    if not isinstance(value, hint):
        raise _Wrong(where, value, _describe(hint))
    return value


def _describe(hint):
    if isinstance(hint, types.UnionType):
        return " or ".join(_describe(kind) for kind in typing.get_args(hint))
    if dataclasses.is_dataclass(hint):
        required = [f.name for f in dataclasses.fields(hint) if f.default is dataclasses.MISSING]
        return "a section" + (" with " + ", ".join(required) if required else "")
    if typing.get_origin(hint) is Literal:
        return "one of " + ", ".join(typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        kind = typing.get_args(hint)[0]
        if dataclasses.is_dataclass(kind):
            return _describe(kind) + ", or a list of them"
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
