"""The finished student on the Hub: its folder and a card written from the run, in one commit."""

import json
import os
import re
import shlex
from fnmatch import fnmatch
from pathlib import Path
from urllib.parse import quote

import yaml
from huggingface_hub import (
    CommitOperationAdd,
    CommitOperationDelete,
    EvalResult,
    HfApi,
    ModelCard,
    ModelCardData,
    get_token,
    model_info,
)
from huggingface_hub.errors import HTTPError  # of whichever HTTP library it uses
from huggingface_hub.utils import disable_progress_bars, logging

from scavenger import student
from scavenger.model import HyenaConfig
from scavenger.recipe import EMBEDDED_TEACHER, Hub, RecipeError
from scavenger.report import comparison, report
from scavenger.run import checkpoint
from scavenger.run.run import Run


# What from_pretrained reads. Anything else in the folder (and whatever is pickled) stays where it is.
PUSHED = (".jinja", ".json", ".model", ".py", ".safetensors", ".txt")
# What an earlier push may have left and the loader would take for this model's: other shards, another certificate,
# parts of another tokenizer. Only files at the top of the repository; adapters and other folders are left alone.
REPLACED = (
    "model.safetensors",
    "model-*-of-*.safetensors",
    "model.safetensors.index.json",
    "certificate.json",
    "filters.json",  # the certificate's name in earlier versions
    "added_tokens.json",
    "chat_template.jinja",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.model",
    "vocab.json",
)
# Keys whose values are paths on this machine; of these, and of every other string that is one, only the last
# component leaves it.
PATH_KEYS = ("run_dir", "path", "folder", "tasks_path", "task_files")
# Tokens may look like paths: these files, and in others these keys, are uploaded as they are.
VOCABULARIES = ("added_tokens.json", "special_tokens_map.json", "tokenizer.json", "vocab.json")
TOKEN_KEYS = ("_token", "_tokens", "_tokens_decoder")


def run(run: Run):
    """Push the run where its recipe names a repository; only the main process does."""
    if run.recipe.hub and run.accelerator.is_main_process:
        push(run.folder, run.recipe.hub)


def push(run_dir: Path, target: Hub):
    """Send the recurrent student, or the distilled one where there is no recurrence, and its card; prints where it is.

    One commit, so that a reader sees the old model or the new one. Raises RecipeError, one line, with the command
    that resumes the push.
    """
    logging.set_verbosity_error()  # its warnings name upload addresses, which whoever has them can write to
    disable_progress_bars()  # a broken upload leaves them open, on the line of the message
    folder = student_folder(run_dir)
    student.load(folder)  # whole and finite, or nothing is sent
    files = {path.name: _content(path) for path in sorted(folder.iterdir()) if _is_pushed(path)}
    files["README.md"] = str(model_card(run_dir, target)).encode()
    try:
        require_token()
        address = _send(target, files, f"{_kind(folder).capitalize()} student, by scavenger")
    except Exception as error:  # the library raises what its HTTP stack raises, and errors of its own
        command = ["scavenger", "push", str(run_dir), "--to", target.name]
        command += ["--private"] if target.private else []
        command += ["--revision", target.revision] if target.revision else []
        raise RecipeError(
            f"{_reason(error, target)}; everything in {run_dir} is kept: resume with `{shlex.join(command)}`"
        ) from None
    print(f"\nhub: {address}")


def require_token():
    """Refuse to go on without a token; asked before any training.

    Only whether there is one: asking the Hub who it belongs to would need a network that a training does not need,
    and a token that is refused after all costs no more than the push.
    """
    try:
        found = get_token()
    except Exception:  # a token that a continuous-integration service should have lent, and did not
        found = None
    if found is None:
        raise RecipeError("hub: found no token; expected one with write access, from `hf auth login` or in HF_TOKEN")


def student_folder(run_dir: Path) -> Path:
    """The folder of a run that is pushed: the last student it made."""
    if not (run_dir / "recipe.yaml").is_file():
        raise RecipeError(f"{run_dir}: found no recipe.yaml; expected the folder of a run")
    for name in ("recurrence", "transfer"):
        if checkpoint.complete(run_dir / name):
            if name == "transfer" and _recipe(run_dir).get("recurrence"):
                raise RecipeError(
                    f"{run_dir}: the recipe asks for a recurrence, and the run has none yet; expected a finished run: "
                    f"{shlex.join(['scavenger', str(run_dir / 'recipe.yaml')])} finishes it"
                )
            return run_dir / name
    raise RecipeError(
        f"{run_dir}: the run has no student yet (its transfer is not complete); expected a finished run: "
        f"{shlex.join(['scavenger', str(run_dir / 'recipe.yaml')])} finishes it"
    )


def model_card(run_dir: Path, target: Hub) -> ModelCard:
    """The card: metadata that the Hub reads, and for people what this is, what it is worth, and how it was made."""
    folder = student_folder(run_dir)
    recipe = _recipe(run_dir)
    config = HyenaConfig.from_pretrained(folder)
    measured = run_dir / "report" / "report.json"
    figures = checkpoint.read_json(measured) if measured.is_file() else None
    row = figures and figures["models"].get(_kind(folder))
    licence = _licence(recipe, run_dir)
    data = ModelCardData(
        model_name=target.name.split("/")[1],
        library_name="transformers",
        pipeline_tag="text-generation",
        base_model=recipe["teacher"]["name"] if recipe["teacher"]["path"] is None else None,
        datasets=[recipe["data"]["name"]] if recipe["data"]["path"] is None and recipe["data"]["name"] else None,
        tags=["scavenger", "hyena", "distillation", *(["recurrence"] if config.filter == "modal" else [])],
        eval_results=[_result(recipe, row)] if row else None,
        **(licence or {"license": "unknown"}),
    )
    sections = [
        f"# {data.model_name}",
        _what_it_is(recipe, config),
        _how_to_load(target),
        _comparison(recipe, figures, _kind(folder)),
        _certificate(folder),
        _limits(recipe, config, figures),
        _licence_text(licence),
        _how_it_was_made(recipe, run_dir),
    ]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n" + "\n\n".join(filter(None, sections)) + "\n")


def _send(target, files, message):
    """Make repository and branch where there are none, and commit; returns the commit's address."""
    api = HfApi()
    # None, not False: an account whose repositories are private by default keeps them so.
    api.create_repo(target.name, private=target.private or None, exist_ok=True)
    if target.private and not api.model_info(target.name).private:
        raise RecipeError(f"hub: {target.name} exists and is public; expected a private repository, or a new name")
    if target.revision and target.revision != "main":
        api.create_branch(target.name, branch=target.revision, exist_ok=True)
    there = api.list_repo_files(target.name, revision=target.revision)
    stale = [name for name in there if name not in files and any(fnmatch(name, pattern) for pattern in REPLACED)]
    commit = api.create_commit(
        target.name,
        [CommitOperationDelete(name) for name in stale]
        + [CommitOperationAdd(name, content) for name, content in files.items()],
        commit_message=message,
        revision=target.revision,
    )
    return commit.commit_url


def _what_it_is(recipe, config):
    kept, layers = config.attention_layers, config.num_hidden_layers
    parts = []
    if config.num_filters:
        parts.append(
            f"{recipe['student']['mixer']}, {config.num_filters * config.hyena_order} long filters per layer, "
            f"each over {config.filter_head_width} channels"
        )
    if config.window:
        parts.append(f"softmax attention over the last {config.window:,} tokens")
    mixers = [f"{_layers(set(range(layers)) - set(kept))}: {', and '.join(parts)}"]
    seen = f"over the last {config.attention_window:,} tokens" if config.attention_window else "over all earlier tokens"
    if kept:
        mixers.append(f"{_layers(kept)}: the teacher's attention, {seen}")
    heads = recipe["student"].get("attention_heads") or []
    if heads:
        mixers.append(f"head {', '.join(heads)}: the teacher's attention, {seen}")
    grows = "The state of the kept attention grows with the text."
    constant = "Every new token takes the same time and memory, however long the text before it is."
    if config.filter != "modal":
        generation = "Its filters are not recurrences. To generate, it keeps the inputs of all its long convolutions."
    else:
        generation = grows if config.state_grows else constant
        if config.num_filters:
            generation = f"Each filter was then turned into a recurrence (poles and residues). {generation}"
    replaced = "Hyena long convolutions replace" if config.num_filters else "Attention in a short window replaces"
    return "\n".join(
        [
            f"A language model that scavenger distilled from {_teacher_name(recipe)}, a Transformer of {layers} layers "
            f"of width {config.hidden_size}. {replaced} its attention. All other parts have the teacher's shape and "
            "started from its weights.",
            "",
            *_items(mixers),
            "",
            generation,
        ]
    )


def _how_to_load(target):
    revision = f', revision="{target.revision}"' if target.revision and target.revision != "main" else ""
    where = f'"{target.name}"{revision}, trust_remote_code=True'
    return f"""## Use

The model's code is in this repository, so it loads with `trust_remote_code=True`. It needs transformers 5.24 or later.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({where})
tokenizer = AutoTokenizer.from_pretrained({where})
inputs = tokenizer("The first", return_tensors="pt", return_token_type_ids=False)
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=40)[0]))
```"""


def _comparison(recipe, figures, label):
    if figures is None:
        return "## Results\n\nThe run made no report, so nothing was measured or compared."
    header, rows = report.cells(figures)
    # A report made by an earlier version has no chat_loss.
    whose = " of the assistant" if figures.get("chat_loss") == "assistant" else ""
    lines = ["| " + " | ".join(cells) + " |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join(
        [
            "## Results",
            "",
            report.verdict(figures),
            "",
            *lines,
            "",
            f"Measured on {figures['test_tokens']:,} predicted tokens{whose}, from the test split of "
            f"{_text_in_prose(recipe)}. "
            "Agreement is the share of positions where student and teacher have the same most likely token. "
            f"Seed {figures['seed']}. Speeds are from one run on the machine that made the model.",
            *(["", comparison.verdict(figures["comparison"], [label])] if "comparison" in figures else []),
        ]
    )


def _certificate(folder):
    """What the recurrences lost, in a few lines; nothing where there is no recurrence."""
    if not (folder / "certificate.json").is_file():
        return None
    facts = checkpoint.read_json(folder / "certificate.json")
    settings, against = facts["settings"], facts["model"]
    found = [(layer, filter) for layer, entry in enumerate(facts["layers"]) for filter in entry["filters"]]
    layer, worst = max(found, key=lambda pair: pair[1]["relative_error"])
    modes = [filter["state_size"] for _, filter in found]
    lines = [
        f"modes: {sum(modes):,} in total, {sum(modes) / len(modes):.1f} per filter on average, {max(modes)} at most",
        f"worst filter: relative l2 error {worst['relative_error']:.2e} over the first {settings['horizon']:,} taps, "
        f"in layer {layer}; proven lower bound for any recurrence with as many states: {worst['floor']:.2e}",
        f"largest |pole|: {facts['largest_radius']:.4f}"
        + (" (every recurrence is stable)" if facts["largest_radius"] < 1 else ""),
        f"compared with the exact student on {against['tokens']:,} held-out tokens: KL {against['divergence']:.2e} "
        f"nats per token, the same most likely token at {100 * against['agreement']:.2f} % of positions, perplexity "
        f"{against['perplexity']:.3f} (exact: {against['exact_perplexity']:.3f})",
    ]
    lines += [
        f"the same in contexts of {entry['context_length']:,} tokens, at positions past the matched taps: KL "
        f"{entry['beyond_horizon']['divergence']:.2e} nats per token, the same most likely token at "
        f"{100 * entry['beyond_horizon']['agreement']:.2f} % of positions"
        for entry in against["contexts"]
        if entry["beyond_horizon"]
    ]
    return "\n".join(
        [
            "## Certificate of the recurrence",
            "",
            facts["verdict"],
            "",
            *_items(lines),
            "",
            "`certificate.json` has the figures of every filter.",
        ]
    )


def _limits(recipe, config, figures):
    length = recipe["data"]["context_length"]
    seen = figures["models"]["distilled"]["tokens_seen"] if figures else None
    text = f"{seen:,} tokens of {_text_in_prose(recipe)}" if seen else _text_in_prose(recipe)
    unchecked = "its output was not checked for false or harmful statements."
    lines = [
        f"It was distilled in contexts of {length:,} tokens, on {text}. "
        "It was not trained to recall anything from further back.",
        f"One seed ({recipe['seed']}) was run. The variation between seeds was not measured.",
        "It learned from its teacher's output distribution, so it has the teacher's errors and gaps.",
        unchecked.capitalize()
        if recipe["data"].get("chat_column")
        else f"It is a plain language model: it was not tuned to follow instructions, and {unchecked}",
        "`trust_remote_code=True` runs the code in this repository: read it first, and pin a revision.",
    ]
    if config.keeps_attention:
        reach = (
            f"cannot look back further than {config.widest_window:,} tokens"
            if config.widest_window
            else "keeps every key and value, so the time and memory per token grow with the text"
        )
        where = [_layers(config.attention_layers)] if config.attention_layers else []
        if heads := recipe["student"].get("attention_heads"):
            where.append(f"head {', '.join(heads)}")
        lines.insert(1, f"Its kept attention ({' and '.join(where)}) {reach}.")
    if config.filter != "modal":
        lines.insert(1, "It has no recurrence, so generation slows down as the text grows.")
    return "\n".join(["## Limits", "", *_items(lines)])


def _licence_text(licence):
    whose = "## Licence\n\nThe student holds weights of its teacher, so the teacher's licence applies"
    if licence is None or licence["license"] == "other" and "license_name" not in licence:
        return f"{whose}. That licence could not be found; ask the teacher's authors before you use the model."
    return f"{whose}: {licence.get('license_name') or licence['license']}."


def _how_it_was_made(recipe, run_dir):
    environment = checkpoint.read_json(run_dir / "environment.json")
    versions = ", ".join(f"{name} {version}" for name, version in environment.items())
    distillation, hyena, multihyena = (
        f"[{number}](https://arxiv.org/abs/{number})" for number in ("2401.17574", "2302.10866", "2310.18780")
    )
    return "\n".join(
        [
            "## How it was made",
            "",
            "First the mixers learned to reproduce the outputs of the teacher's attention. Then the student learned "
            f"the teacher's output distribution ({distillation}). The mixers follow Hyena ({hyena}) and MultiHyena "
            f"({multihyena}); the recurrences also follow the MultiHyena paper.",
            "",
            "<details><summary>The recipe, with every default</summary>",
            "",
            "```yaml",
            yaml.safe_dump(_shown(recipe), sort_keys=False) + "```",
            "",
            "</details>",
            "",
            f"Made with {versions}.",
        ]
    )


def _recipe(run_dir):
    """The run's resolved recipe as plain values: teacher and text need not be on this machine any more."""
    try:
        values = yaml.safe_load((run_dir / "recipe.yaml").read_text(encoding="utf-8"))
        made = {**values, "teacher": dict(values["teacher"]), "data": dict(values["data"])}
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError):
        raise RecipeError(f"{run_dir / 'recipe.yaml'}: cannot be read; expected the recipe that a run wrote") from None
    for section in (made["teacher"], made["data"]):
        name = section["name"]
        if name and (_is_path(name) or name.count("/") > 1):  # a folder where a Hub name was meant
            section |= {"path": name, "name": None}
    return made


def _shown(recipe):
    """The recipe as others may see it, and run it: no folder of this machine, and no repository to push to."""
    return _without_paths({key: value for key, value in recipe.items() if key != "hub"})


def _without_paths(value, is_path=False):
    """A value of a recipe or of a JSON file in which every path on this machine is its last component."""
    if isinstance(value, dict):
        return {
            key: item if key.endswith(TOKEN_KEYS) else _without_paths(item, key in PATH_KEYS)
            for key, item in value.items()
        }
    if isinstance(value, list):
        return [_without_paths(item, is_path) for item in value]
    if isinstance(value, str) and value and (is_path or _is_path(value)):
        return _last_component(value)
    return value


def _is_path(text):
    return re.match(r"/.|~|\.\.?(/|$)|file:", text) is not None or ("/" in text and os.path.exists(text))


def _content(path):
    """The file as it is uploaded: itself, or without the paths that it names, as tokenizers' configurations do."""
    if path.suffix != ".json" or path.name in VOCABULARIES:
        return path
    values = checkpoint.read_json(path)
    shown = _without_paths(values)
    return path if shown == values else (json.dumps(shown, indent=2, ensure_ascii=False) + "\n").encode()


def _licence(recipe, run_dir):
    """The teacher's `license`, `license_name` and `license_link`, those that it gives; None where it gives none."""
    teacher = recipe["teacher"]
    try:
        if teacher["path"] is None and teacher["name"] is not None:
            card = model_info(teacher["name"], revision=teacher["revision"]).card_data
        else:
            made = run_dir / "teacher" if teacher["train"] else EMBEDDED_TEACHER
            card = ModelCard.load(Path(teacher["path"] or made) / "README.md").data
    except Exception:  # no card, one that is no YAML, a Hub out of reach: all the same to the reader
        return None
    found = {key: card.get(key) for key in ("license", "license_name", "license_link")} if card else {}
    # A link that is none is a file beside the teacher, not beside this model.
    if found.get("license_link") and not found["license_link"].startswith(("https://", "http://")):
        found["license_link"] = (
            f"https://huggingface.co/{teacher['name']}/blob/{teacher['revision'] or 'main'}/{found['license_link']}"
            if teacher["path"] is None and teacher["name"]
            else None
        )
    return {key: value for key, value in found.items() if value} if isinstance(found.get("license"), str) else None


def _result(recipe, row):
    data = recipe["data"]
    local = data["path"] is not None or data["name"] is None
    name = _text_name(recipe).strip("`")
    return EvalResult(
        task_type="text-generation",
        dataset_type=re.sub(r"[^a-z0-9._-]+", "-", name.lower()).strip("-") or "local" if local else data["name"],
        dataset_name=name,
        dataset_config=None if local else data["subset"],
        dataset_revision=None if local else data["revision"],
        dataset_split="test",
        metric_type="perplexity",
        metric_name="perplexity",
        metric_value=round(row["perplexity"], 4),
    )


def _teacher_name(recipe):
    teacher = recipe["teacher"]
    if teacher["path"] is not None:
        return _code(_last_component(teacher["path"]))
    if teacher["name"] is not None:
        return f"[{_code(teacher['name'])}](https://huggingface.co/{quote(teacher['name'])})"
    return (
        "a teacher that the same recipe trained" if teacher["train"] else f"scavenger's own `{EMBEDDED_TEACHER.name}`"
    )


def _text_name(recipe):
    data = recipe["data"]
    if data["path"] is not None:
        return _code(_last_component(data["path"]))
    return _code(data["name"]) if data["name"] else "Python standard library"


def _text_in_prose(recipe):
    name = _text_name(recipe)
    return name if name.startswith("`") else f"the {name}"


def _code(name):
    """A name as code: Markdown reads nothing in it."""
    return f"`{' '.join(name.replace('`', '').split())}`"


def _last_component(path):
    """Of a folder on this machine no more than its own name; the target of a link and a home folder stay unnamed."""
    if path.startswith("~") and "/" not in path.rstrip("/"):
        return "~"
    path = os.path.abspath(os.path.expanduser(path))
    return "~" if path == os.path.expanduser("~") else os.path.basename(path) or "/"


def _kind(folder):
    """The student's name in the report."""
    return {"recurrence": "recurrent", "transfer": "distilled"}[folder.name]


def _items(lines):
    return [f"- {line}" for line in lines]


def _layers(indices):
    return f"layer{'s' if len(indices) > 1 else ''} {', '.join(map(str, sorted(indices)))}"


def _is_pushed(path):
    return path.is_file() and path.suffix in PUSHED


def _reason(error, target):
    """What went wrong in words, without addresses and request numbers, and never with the token."""
    if isinstance(error, RecipeError):
        return str(error)
    uploading = isinstance(error, RuntimeError) and error.__cause__ is not None
    if uploading:
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    said = error.server_message if hasattr(error, "server_message") else str(error)
    said = re.sub(r"https?://\S+|\(?\w+ ID: [^)\s]*\)?", "", said or "").replace(get_token() or "\0", "")
    said = " ".join(said.split())[:200] or type(error).__name__
    if uploading:
        return f"hub: the upload to {target.name} broke off ({f'the Hub answered {status}' if status else said})"
    if status == 401:
        return "hub: the token was refused (401); expected one with write access, from `hf auth login` or in HF_TOKEN"
    if status == 403:
        return f"hub: the token may not write to {target.name} (403); expected a repository of the token's account"
    if status is not None:
        return f"hub: the Hub answered {status} ({said})"
    if isinstance(error, (OSError, HTTPError)):
        return f"hub: the Hub was not reached ({said})"
    return f"hub: the push to {target.name} failed ({type(error).__name__}: {said})"
