"""Tasks of the Language Model Evaluation Harness (lm_eval, the extra `eval`), kept question by question.

Each task of each model is a separate measurement, so that an interrupted evaluation resumes with the next task. A
recurrent student is evaluated as it generates: lm_eval calls the model as a prompt is processed, and there the outputs
come from the modes, by the scan of the recurrence (`modal_scan`) or by their taps where that is faster, which is the
same sum.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from scavenger import measure
from scavenger.report import metrics
from scavenger.report.evaluated import Evaluated, readable
from scavenger.report.metrics import Metric
from scavenger.report.results import Results
from scavenger.report.text import Text


# The tasks of the Hyena distillation paper (arXiv:2401.17574) and of Pythia (arXiv:2304.01373), and what is quoted of
# each: acc_norm, which divides by the length of a choice, where choices are sentences of very different lengths.
HEADLINES = {
    "lambada_openai": "acc",
    "arc_easy": "acc",
    "arc_challenge": "acc_norm",
    "piqa": "acc",
    "sciq": "acc",
    "winogrande": "acc",
    "logiqa": "acc",
    "wsc": "acc",
    "hellaswag": "acc_norm",
}
TASKS = tuple(HEADLINES)
TEXT_TASKS = {"text_perplexity", "text_last_word"}  # in eval/tasks
SHARES = ("acc", "acc_norm", "acc_bytes", "acc_mutual_info", "exact_match")
PACKAGES = ("lm_eval", "torch", "transformers", "datasets")
PYTHIA = Path(__file__).with_name("pythia.json")


@dataclass(frozen=True)
class Settings:
    """What is asked, and how.

    Without `tasks` it is TASKS, less those whose documents are not there. Documents come from the Hub, or where
    `include` has task files that read them from files, from below the folder `local`. `text` is for the tasks that read
    a text (TEXT_TASKS).
    """

    context_length: int  # tokens; what is longer loses its beginning
    tasks: tuple[str, ...] = ()
    limit: int | None = None  # questions of each task, the first ones
    seed: int = 0
    local: str | None = None
    text: Text | None = None
    include: tuple[str, ...] = ()  # folders of task files, which come before the harness' own

    def __post_init__(self):
        if self.context_length < 2:
            raise ValueError(f"found a context of {self.context_length} tokens; expected 2 or more")
        for folder in (*self.include, *([self.local] if self.local is not None else [])):
            if not Path(folder).is_dir():
                raise ValueError(f"found no folder {folder}; expected one of task files or documents")

    @property
    def shown(self) -> dict:
        """What the tables say."""
        names = ("limit", "context_length", "seed")
        sources = [source for source in (self.local, self.text and self.text.name) if source is not None]
        return {name: getattr(self, name) for name in names} | {"documents": " and ".join(sources) or "Hub"}


@dataclass(frozen=True)
class Questions:
    """Tasks of the harness with their documents, and those of TASKS whose documents are not there.

    `digests` change with what is asked, and do not with where the documents came from.
    """

    tasks: dict[str, Any]
    digests: dict[str, str]
    missing: list[str]


def settings_for(models: list[Evaluated], context_length: int | None = None, **others) -> Settings:
    """The context that is not given is the shortest that a model was trained on, for all of them."""
    length = context_length or min(model.training_context for model in models)
    return Settings(readable(models, length, "tasks"), **others)


def of_models(models: list[Evaluated], settings: Settings, results: Results) -> list[dict]:
    """All tasks of all models; beside a model of Pythia, what was published of it."""
    questions, found = questions_of(settings), []
    for model in models:
        found.append(of_model(model, questions, settings, results))
        model.close()
        beside = published_result(model, questions)
        if beside is not None:
            found.append(beside)
    return found


def questions_of(settings: Settings) -> Questions:
    """Read the tasks' documents; a task that was not asked for by name may lack them, which is said."""
    manager, loaded, missing = _manager(settings), {}, []
    for name in settings.tasks or TASKS:
        try:
            loaded |= manager.load([name])["tasks"]
        except ConnectionError as error:
            raise ValueError(
                f"{name}: its documents cannot be read ({_line(error)}); expected a reachable Hub, or --local FOLDER"
            ) from error
        except (OSError, RuntimeError) as error:  # RuntimeError: a data set that needs code of its own
            if settings.tasks:
                raise ValueError(_line(error)) from error
            print(f"{name} is left out: {_line(error)}", file=sys.stderr)
            missing.append(name)
    if not loaded:
        raise ValueError(f"found no documents of {', '.join(missing)}; expected those of one task at least")
    for task in loaded.values():
        task.set_config("num_fewshot", 0)
        task.set_fewshot_seed(settings.seed)
    digests = {name: _digest(task, settings.limit) for name, task in loaded.items()}
    return Questions(loaded, digests, missing)


def of_model(model: Evaluated, questions: Questions, settings: Settings, results: Results) -> dict:
    """All tasks of one model as one result; the model is loaded if a task is not among the results yet."""
    harness = functools.cache(lambda: language_model(model, settings))
    found = []
    for task in questions.tasks:
        record = settings.shown | {"questions": questions.digests[task]}
        del record["documents"]  # the same questions from another place are the same
        found.append(
            results.of(
                f"harness {task}", model, record, lambda task=task: of_task(model, task, questions, settings, harness())
            )
        )
    versions = {task: result["versions"].pop(task) for task, result in zip(questions.tasks, found, strict=True)}
    return {key: found[0][key] for key in ("model", "path", "weights", "versions")} | {
        "measurement": "harness",
        "settings": settings.shown,
        "metrics": list(itertools.chain.from_iterable(result["metrics"] for result in found)),
        "unmeasured": [f"{task} {HEADLINES[task]}" for task in questions.missing],
        "questions": questions.digests,
        "task_versions": versions,
        "seconds": sum(result["seconds"] for result in found),
    }


def of_task(model: Evaluated, task: str, questions: Questions, settings: Settings, harness=None) -> dict:
    """One task of one model: its metrics, each with every question's score in the order of the documents."""
    import lm_eval

    print(f"{model.label}: {task}", file=sys.stderr)
    harness = language_model(model, settings) if harness is None else harness
    random.seed(settings.seed)
    np.random.seed(settings.seed)  # noqa: NPY002  (tasks of the harness may draw from it)
    torch.manual_seed(settings.seed)
    # Not simple_evaluate, which does the same and then takes seconds to describe the machine, for each task again.
    asked = {"tasks": {task: questions.tasks[task]}, "groups": {}, "group_map": {}}
    found = lm_eval.evaluate(harness, asked, limit=settings.limit, bootstrap_iters=0, log_samples=True)
    measured = _metrics(task, questions.tasks[task], sorted(found["samples"][task], key=lambda each: each["doc_id"]))
    if not measured:
        raise ValueError(f"{task}: found no score that is a mean over questions; expected one at least")
    versions = {name: importlib.metadata.version(name) for name in PACKAGES} | {task: found["versions"][task]}
    return {"metrics": [metrics.packed(metric) for metric in measured], "versions": versions}


def language_model(model: Evaluated, settings: Settings):
    """The model as the harness has it, except that logits are made in chunks; log p in float32 or wider."""

    class Chunked(_imported("lm_eval.models.huggingface").HFLM):
        def _loglikelihood_tokens(self, requests, disable_tqdm=False, override_bs=None):
            pairs = [(context, continuation) for _, context, continuation in requests]
            found = log_likelihoods(self.model, pairs, self.max_length, disable_tqdm)
            for (asked, *_), answer in zip(requests, found, strict=True):
                if asked is not None:  # a window of a longer text
                    self.cache_hook.add_partial("loglikelihood", asked, answer)
            return found

    return Chunked(
        pretrained=model.model,
        tokenizer=model.tokenizer,
        backend="causal",
        max_length=settings.context_length,
        softmax_dtype=torch.promote_types(model.model.dtype, torch.float32),
        batch_size=max(1, measure.BATCH_TOKENS // settings.context_length),
    )


def log_likelihoods(
    model: nn.Module, pairs: list[tuple[list[int], list[int]]], most: int, silent: bool = False
) -> list[tuple[float, bool]]:
    """log p of each continuation after its context, in nats, and whether greedy decoding would give it.

    A model reads `most` tokens, the last ones, of each pair; continuations that differ only in their last token are
    read once.
    """
    whole = [(context + continuation)[-most - 1 :] for context, continuation in pairs]
    order = sorted(range(len(pairs)), key=lambda pair: (-len(whole[pair]), whole[pair]))
    groups = [list(alike) for _, alike in itertools.groupby(order, key=lambda pair: whole[pair][:-1])]
    found = [None] * len(pairs)
    with tqdm(total=len(pairs), desc="Running loglikelihood requests", disable=silent) as bar:
        while groups:
            width = len(whole[groups[0][0]]) - 1
            rows = max(1, measure.BATCH_TOKENS // width)
            batch, groups = groups[:rows], groups[rows:]
            # Padded on the right, which does not affect a causal model's predictions of the tokens before.
            ids, wanted = np.zeros((len(batch), width), dtype=np.int64), np.zeros((len(batch), width), dtype=bool)
            counts, tokens = [], []
            for row, group in enumerate(batch):
                read = whole[group[0]]
                end, count = len(read) - 1, max(len(pairs[pair][1]) for pair in group)
                ids[row, :end], wanted[row, max(0, end - count) : end] = read[:-1], True
                counts.append(min(count, end))
                asked = np.tile(np.array(read[-counts[-1] :])[:, None], max(map(len, batch)))
                asked[-1, : len(group)] = [whole[pair][-1] for pair in group]
                tokens.append(asked)
            log_p, likeliest = measure.log_probabilities(model, ids, wanted, np.concatenate(tokens))
            ends = np.cumsum(counts)
            for end, count, group, asked in zip(ends, counts, batch, tokens, strict=True):
                for choice, pair in enumerate(group):
                    own = min(count, len(pairs[pair][1]))
                    greedy = (likeliest[end - own : end] == asked[-own:, choice]).all()
                    found[pair] = float(log_p[end - own : end, choice].sum()), bool(greedy)
            bar.update(sum(map(len, batch)))
    return found


def published(path: str) -> dict[str, float]:
    """What EleutherAI published of a model of Pythia, by metric; nothing of other models.

    It is known by its name on the Hub, or as the last part of a folder's path.
    """
    owner, _, name = str(path).rstrip("/").rpartition("/")
    if owner != "EleutherAI" and not Path(path).is_dir():
        return {}
    scores = json.loads(PYTHIA.read_text(encoding="utf-8"))["models"].get(name, {})
    return {metric: value for metric, (value, _) in scores.items()}


def published_of(model: Evaluated) -> dict[str, float]:
    """The same of a model that is measured: not of a student, nor of another step of the training."""
    last = model.revision in (None, "main", "step143000")
    return published(model.path) if last and not model.is_student else {}


def published_result(model: Evaluated, questions: Questions) -> dict | None:
    """The published scores of the tasks, as a column of a table beside the model; None where there are none."""
    asked = {*questions.tasks, *questions.missing}
    found = [_score(name, value) for name, value in published_of(model).items() if name.split()[0] in asked]
    if not found:
        return None
    return {
        "measurement": "harness",
        "model": f"{model.label}, published",
        "settings": {},
        "metrics": [metrics.packed(metric) for metric in found],
        "source": json.loads(PYTHIA.read_text(encoding="utf-8"))["source"],
    }


def _score(name, value):
    """A score of unknown questions: one item, hence no interval."""
    if name.endswith("perplexity"):
        return Metric(name, [math.log(value)], [1.0], "", "lower", exponential=True)
    return Metric(name, [value], [1.0], "share", "higher", headline=HEADLINES[name.split()[0]] == name.split()[1])


def _manager(settings):
    """The tasks of `include`, and the harness' own where others are asked for: it takes seconds to find those."""
    TaskManager = _imported("lm_eval.tasks").TaskManager
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    names = settings.tasks or TASKS
    metadata = {"local": settings.local, "documents": settings.text and settings.text.documents}
    sources = {"include_path": list(settings.include), "metadata": metadata}
    manager = TaskManager(include_defaults=False, **sources)
    if not set(names) <= set(manager.all_tasks):
        manager = TaskManager(**sources)
    for name in names:
        if name not in manager.all_tasks:
            others = "".join(f" nor of {path}" for path in settings.include)
            raise ValueError(f"--tasks: {name} is not a task of the harness{others}")
    return manager


def _imported(module):
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"lm_eval cannot be imported ({_line(error)}); pip install 'scavenger[eval]'") from error


# Of a task's configuration, what decides its requests and their scores beside its documents.
ASKED = ("description", "target_delimiter", "output_type", "metric_list", "generation_kwargs", "filter_list", "repeats")


def _digest(task, limit):
    """Of what the task asks for and how, of texts, choices and answers, whatever else the documents have."""
    asked = hashlib.sha256()
    how = {key: task.get_config(key) for key in ASKED}
    asked.update(json.dumps(how, default=lambda made: getattr(made, "__name__", "made"), sort_keys=True).encode())
    for document in itertools.islice(task.eval_docs, limit):
        parts = [task.doc_to_text(document), task.doc_to_target(document)]
        if task.get_config("doc_to_choice") is not None:
            parts.append(task.doc_to_choice(document))
        asked.update(json.dumps(parts, default=str).encode())
    return asked.hexdigest()[:16]


def _metrics(name, task, samples):
    """What the harness aggregates over questions, as sums over them."""
    found, higher = [], task.higher_is_better()
    for score, aggregate in task.aggregation().items():
        for kind in dict.fromkeys(sample["filter"] for sample in samples):
            values = [sample[score] for sample in samples if sample["filter"] == kind and score in sample]
            sums = _sums(values, getattr(aggregate, "__name__", ""))
            if not values or sums is None:
                print(f"{name}: {score} is left out, it is no mean over questions", file=sys.stderr)
                continue
            found.append(
                Metric(
                    f"{name} {score}" + ("" if kind == "none" else f" ({kind})"),
                    *sums,
                    unit="share" if score in SHARES else "bits" if score == "bits_per_byte" else "",
                    better="higher" if higher[score] else "lower",
                    exponential=score.endswith("perplexity"),
                )
            )
    quoted = f"{name} {HEADLINES[name]}" if name in HEADLINES else found[0].name if found else ""
    return [dataclasses.replace(metric, headline=metric.name == quoted) for metric in found]


def _sums(values, aggregate):
    """Numerators and denominators whose ratio, or its exponential, is the aggregate; None where there are none."""
    match aggregate:
        case "mean":
            return [float(value) for value in values], [1.0] * len(values)
        case "perplexity":
            return [-float(value) for value in values], [1.0] * len(values)
        case "weighted_perplexity":
            return [-float(value) for value, _ in values], [float(count) for _, count in values]
        case "bits_per_byte":
            return [-float(value) / math.log(2) for value, _ in values], [float(count) for _, count in values]


def _line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]
