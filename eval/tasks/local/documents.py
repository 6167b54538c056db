"""The harness' own tasks with documents from files: `lm_eval --metadata local=FOLDER` names the folder they are below.

Prompts, choices and metrics are those of the harness, whose task file each YAML of this folder names; only the reading
of the documents is replaced, and without a folder they come from the Hub as ever. Each format is brought into the form
that the Hub has, which is a format too.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset
from lm_eval import tasks
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml


class LocalTask(ConfigurableTask):
    """The task of the file `built_in`; `files`, `records` and `row` say where its documents are and how they read."""

    def __init__(self, config: dict):
        own = {key: value for key, value in config.items() if key != "class"}
        self.files, self.records, self.row = (own.pop(key) for key in ("files", "records", "row"))
        built_in = load_yaml(Path(tasks.__file__).parent / own.pop("built_in"))
        built_in.pop("tag", None)
        own["metadata"] = built_in["metadata"] | own["metadata"]
        if own["metadata"].get("local") is not None:  # there is one split then, and no examples to show
            split = "test_split" if built_in.get("test_split") else "validation_split"
            built_in |= {"training_split": None, "validation_split": None, "test_split": None, split: "local"}
        super().__init__(config=built_in | own)

    def download(self, *args, **kwargs):
        folder = self.config.metadata.get("local")
        if folder is None:
            return super().download(*args, **kwargs)
        path, rows = find(self.config.task, Path(folder), self.files), []
        for where, record in self.records(path):
            try:
                rows.append(self.row(record))
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from None
        if not rows:
            raise ValueError(f"{path}: found no documents; expected at least one")
        self.dataset = {"local": Dataset.from_list(rows)}


def find(task: str, folder: Path, names: list[str]) -> Path:
    """The file of the first of these names, in any case, that is anywhere below the folder."""
    files = sorted(Path(parent, name).absolute() for parent, _, inside in os.walk(folder) for name in inside)
    for name in names:
        end = name.lower().split("/")
        found = [path for path in files if [part.lower() for part in path.parts[-len(end) :]] == end]
        if len(found) > 1:
            raise ValueError(f"{task}: found {found[0]} and {found[1]}; expected one {name}")
        if found:
            return found[0]
    raise FileNotFoundError(f"{task}: found no {' or '.join(names)} below {folder}")


def read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = path.read_bytes()[: error.start].count(b"\n") + 1
        raise ValueError(f"{path}, line {line}: found bytes that are not UTF-8; expected text") from None


def json_lines(path: Path) -> Iterator[tuple[str, object]]:
    """A JSON value a line."""
    for number, line in enumerate(read(path).split("\n"), start=1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{where}: found no JSON ({error.msg}); expected a JSON object") from None
            yield where, record


def json_list(path: Path) -> Iterator[tuple[str, object]]:
    """One JSON list, over many lines; or a JSON value a line."""
    text = read(path)
    if not text.lstrip().startswith("["):
        yield from json_lines(path)
        return
    try:
        records = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: found no JSON ({error.msg}); expected a JSON list") from None
    for number, record in enumerate(records, start=1):
        yield f"{path}, item {number}", record


def blocks(path: Path) -> Iterator[tuple[str, list[str]]]:
    """Lines between empty lines."""
    block, first = [], 1
    for number, line in enumerate([*read(path).split("\n"), ""], start=1):
        if line.strip():
            first = first if block else number
            block.append(line.rstrip("\r"))
        elif block:
            yield f"{path}, line {first}", block
            block = []


def with_labels(path: Path) -> Iterator[tuple[str, object]]:
    """A JSON object a line, and beside the file one of labels, a line each; or labels in the objects."""
    labels = path.with_name(f"{path.stem}-labels.lst")
    if not labels.is_file():
        yield from json_lines(path)
        return
    numbers, records = read(labels).split(), list(json_lines(path))
    if len(numbers) != len(records):
        raise ValueError(f"{labels}: found {len(numbers)} labels; expected {len(records)}, one for each of {path.name}")
    for line, ((where, record), number) in enumerate(zip(records, numbers, strict=True), start=1):
        if number not in ("0", "1"):
            raise ValueError(f"{labels}, line {line}: found {number}; expected 0 or 1")
        yield where, record | {"label": int(number)} if isinstance(record, dict) else record


def fields(record: object, **kinds: type) -> list:
    """The values of these fields, each of its kind."""
    if not isinstance(record, dict):
        raise ValueError(f"found a {type(record).__name__}; expected an object with {', '.join(kinds)}")
    for name, kind in kinds.items():
        if name not in record:
            raise ValueError(f"found {', '.join(record)}; expected {', '.join(kinds)}")
        if not isinstance(record[name], kind):
            raise ValueError(f"{name}: found {json.dumps(record[name])[:40]}; expected {kind.__name__}")
    return [record[name] for name in kinds]


def choice(index: int, options: list) -> int:
    """An index into the options, which are texts."""
    if not all(isinstance(option, str) and option for option in options):
        raise ValueError(f"found options {json.dumps(options)[:60]}; expected texts")
    if not 0 <= index < len(options):
        raise ValueError(f"found answer {index} of {len(options)} options; expected 0 to {len(options) - 1}")
    return index


def lambada(record: object) -> dict:
    """{"text"}, or {"context", "continuation"}."""
    if isinstance(record, dict) and "continuation" in record:
        text = " ".join(fields(record, context=str, continuation=str))
    else:
        (text,) = fields(record, text=str)
    if " " not in text.strip():
        raise ValueError(f"found {text[:40]!r}; expected more than one word")
    return {"text": text}


def arc(record: object) -> dict:
    """{"query", "choices", "gold"}, AI2's {"question": {"stem", "choices"}, "answerKey"}, or the Hub's."""
    if isinstance(record, dict) and "query" in record:
        question, options, gold = fields(record, query=str, choices=list, gold=int)
        labels = [chr(ord("A") + place) for place in range(len(options))]
        return _arc(question.removeprefix("Question: "), options, labels, labels[choice(gold, options)])
    if isinstance(record, dict) and isinstance(record.get("question"), dict):
        (key,) = fields(record, answerKey=str)
        question, options = fields(record["question"], stem=str, choices=list)
        pairs = [fields(option, text=str, label=str) for option in options]
        return _arc(question, [text for text, _ in pairs], [label for _, label in pairs], key)
    question, options, key = fields(record, question=str, choices=dict, answerKey=str)
    return _arc(question, *fields(options, text=list, label=list), key)


def _arc(question, texts, labels, key):
    if key not in labels:
        raise ValueError(f"found answer {key}; expected one of {', '.join(map(str, labels))}")
    choice(labels.index(key), texts)
    return {"question": question, "choices": {"text": texts, "label": labels}, "answerKey": key}


def piqa(record: object) -> dict:
    """{"goal", "sol1", "sol2"} and its label."""
    goal, first, second, label = fields(record, goal=str, sol1=str, sol2=str, label=int)
    return {"goal": goal, "sol1": first, "sol2": second, "label": choice(label, [first, second])}


def sciq(record: object) -> dict:
    """{"question", "support", "correct_answer", "distractor1", …}."""
    names = ("question", "support", "distractor1", "distractor2", "distractor3", "correct_answer")
    return dict(zip(names, fields(record, **dict.fromkeys(names, str)), strict=True))


def winogrande(record: object) -> dict:
    """{"context_options", "continuation", "gold"}, or {"sentence", "option1", "option2", "answer"}."""
    if isinstance(record, dict) and "context_options" in record:
        contexts, rest, gold = fields(record, context_options=list, continuation=str, gold=int)
        choice(gold, contexts)
        if len(contexts) != 2:
            raise ValueError(f"found {len(contexts)} context_options; expected 2")
        begin = os.path.commonprefix(contexts)
        begin = begin[: begin.rfind(" ") + 1]  # whole words
        first, second = (context[len(begin) :] for context in contexts)
        sentence, answer = f"{begin}_ {rest}", str(gold + 1)
    else:
        sentence, first, second, answer = fields(record, sentence=str, option1=str, option2=str, answer=str)
    if answer not in ("1", "2"):
        raise ValueError(f"found answer {answer}; expected 1 or 2")
    if "_" not in sentence:
        raise ValueError(f"found {sentence[:40]!r}; expected a sentence with _ in it")
    return {"sentence": sentence, "option1": first, "option2": second, "answer": answer}


def logiqa(record: list[str]) -> dict:
    """The letter of the answer, passage, question and four options, a line each; a space follows each full stop."""
    if len(record) != 7:
        raise ValueError(f"found {len(record)} lines; expected 7: answer, passage, question and four options")
    letter = record[0].strip()
    if letter not in ("a", "b", "c", "d"):
        raise ValueError(f"found answer {letter[:40]!r}; expected a, b, c or d")
    lines = record[1:3] + [option[2:] for option in record[3:]]
    passage, question, *options = (line.replace(".", ". ").strip() for line in lines)
    return {"label": letter, "context": passage, "question": question, "options": options}


def wsc(record: object) -> dict:
    """SuperGLUE's {"text", "target": {"span1_text", …}, "label"}; or the Hub's, with spans as the text has them."""
    text, label = fields(record, text=str, label=int)
    inner = record.get("target", record)
    spans = fields(inner, span1_text=str, span2_text=str, span1_index=int, span2_index=int)
    choice(int(label), ["no", "yes"])
    words = text.split()
    for place in (0, 1):
        span, index = spans[place], spans[place + 2]
        if not span or not 0 <= index < len(words):
            raise ValueError(f"found {span!r} at word {index} of {len(words)}; expected a word of the text")
        if span not in text:  # the Hub's "wsc.fixed" mends what is not a part of the text
            case = str.lower if words[index][0].islower() else str.upper
            spans[place] = (case(span[0]) + span[1:]).rstrip(".").replace("\n", " ")
    names = ("span1_text", "span2_text", "span1_index", "span2_index")
    return {"text": text, "label": int(label)} | dict(zip(names, spans, strict=True))


def hellaswag(record: object) -> dict:
    """The official {"activity_label", "ctx_a", "ctx_b", "endings", "label"}, which is the Hub's."""
    activity, first, second, endings = fields(record, activity_label=str, ctx_a=str, ctx_b=str, endings=list)
    label = str(record.get("label"))
    if not label.isdecimal():
        raise ValueError(f"found label {label}; expected the number of an ending")
    choice(int(label), endings)
    return {"activity_label": activity, "ctx_a": first, "ctx_b": second, "endings": endings, "label": label}
