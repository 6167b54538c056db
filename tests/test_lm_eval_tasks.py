"""Tasks of the Language Model Evaluation Harness: its own questions from local files, its own scores by question."""

import dataclasses
import json
import math
import runpy
import sys
from importlib.metadata import version
from pathlib import Path

import lm_eval
import pytest
import torch
from conftest import LAUNCHED, launch, tiny_student
from datasets import Dataset
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml
from transformers import AutoTokenizer

from scavenger.report import lm_eval_tasks, metrics, text
from scavenger.report.evaluated import Evaluated
from scavenger.report.lm_eval_tasks import Settings
from scavenger.report.metrics import Metric
from scavenger.report.results import Results


ROOT = Path(__file__).parents[1]
OWN = str(ROOT / "eval/tasks")
BUILT_IN = {
    "lambada_openai": "lambada/lambada_openai.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "piqa": "piqa/piqa.yaml",
    "sciq": "sciq/sciq.yaml",
    "winogrande": "winogrande/default.yaml",
    "logiqa": "logiqa/logiqa.yaml",
    "wsc": "super_glue/wsc/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
}


def lines(*records):
    return "".join(json.dumps(record) + "\n" for record in records)


SKY = {
    "question": "What is blue?",
    "choices": {"text": ["grass", "the sky", "coal"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
ICE = {
    "question": "Ice is cold because of",
    "choices": {"text": ["heat", "the cold", "you", "me"], "label": ["1", "2", "3", "4"]},
    "answerKey": "2",
}
FOUNDRY_ARC = lines(
    {"query": "Question: What is blue?", "choices": SKY["choices"]["text"], "gold": 1},
    {"query": "Question: Ice is cold because of", "choices": ICE["choices"]["text"], "gold": 1},
)
PAIR = [
    {"goal": "open a jar", "sol1": "turn the lid", "sol2": "turn the glass of it", "label": 0},
    {"goal": "Dry wet shoes", "sol1": "in a lake", "sol2": "in the sun ", "label": 1},
    {"goal": "é", "sol1": "a", "sol2": "b", "label": 1},
]
WATER = {
    "question": "What is wet?",
    "support": " Water is wet.",
    "distractor1": "sand",
    "distractor2": "fire",
    "distractor3": "a stone",
    "correct_answer": "water",
}
SURGEON = [
    {
        "sentence": "Maria was better than Marcus so _ got the easy cases.",
        "option1": "Maria",
        "option2": "Marcus",
        "answer": "2",
    },
    {"sentence": "The bed hid the dog, as _ was big.", "option1": "the bed", "option2": "the dog", "answer": "1"},
]
LETTERS = "ABCD"
PARK = {
    "label": "d",
    "context": "A park is in town. It has 3. 5 trees.",
    "question": "What follows?",
    "options": ["North. ", "South", "East", "West"],
}
OAT = {
    "text": "The dog , which barked, ate the cookies because it was hungry.",
    "span1_text": "the dog",
    "span1_index": 0,
    "span2_text": "it",
    "span2_index": 9,
}
HAND = {
    "activity_label": "Washing hands",
    "ctx_a": "A man [substeps] stands.",
    "ctx_b": "the man",
    "endings": ["sings.", "runs [title] off.", "washes  up.", "sits."],
    "label": "2",
}
# Files as people have them, the documents as the Hub has them, and one request of the first document, word for word.
FORMATS = {
    "lambada": (
        "lambada_openai",
        {"a/lambada_test.jsonl": lines({"text": "She saw\n\nthe “old man"}, {"text": "a b  c"})},
        [{"text": "She saw\n\nthe “old man"}, {"text": "a b  c"}],
        ("She saw\n\nthe “old", " man"),
    ),
    "lambada, foundry": (
        "lambada_openai",
        {"lambada_openai.jsonl": lines({"context": "She saw the", "continuation": "man"})},
        [{"text": "She saw the man"}],
        ("She saw the", " man"),
    ),
    "arc_easy, foundry": (
        "arc_easy",
        {"arc/arc_easy_test.jsonl": FOUNDRY_ARC},
        [SKY, ICE],
        ("Question: What is blue?\nAnswer:", " the sky"),
    ),
    "arc_challenge, AI2": (
        "arc_challenge",
        {
            "ARC-Challenge-Test.jsonl": lines(
                {
                    "question": {"stem": "Ice?", "choices": [{"text": "a", "label": "3"}, {"text": "b", "label": "4"}]},
                    "answerKey": "4",
                }
            )
        },
        [{"question": "Ice?", "choices": {"text": ["a", "b"], "label": ["3", "4"]}, "answerKey": "4"}],
        ("Question: Ice?\nAnswer:", " b"),
    ),
    "arc_challenge, the Hub's": (
        "arc_challenge",
        {"x/y/arc_challenge_test.jsonl": lines(SKY, ICE)},
        [SKY, ICE],
        ("Question: What is blue?\nAnswer:", " coal"),
    ),
    "piqa": (
        "piqa",
        {
            "PIQA/valid.jsonl": lines(
                *({key: value for key, value in pair.items() if key != "label"} for pair in PAIR)
            ),
            "PIQA/valid-labels.lst": "0\n1\n1\n",
            "other/valid.jsonl": "no JSON",
        },
        PAIR,
        ("Question: open a jar\nAnswer:", " turn the lid"),
    ),
    "sciq, a list": (
        "sciq",
        {"sciq/test.json": json.dumps([WATER, WATER | {"support": ""}], indent=4), "other/test.json": "no JSON"},
        [WATER, WATER | {"support": ""}],
        ("Water is wet.\nQuestion: What is wet?\nAnswer:", " a stone"),
    ),
    "winogrande, foundry": (
        "winogrande",
        {
            "winogrande_xl_valid.jsonl": lines(
                {
                    "context_options": [
                        "Maria was better than Marcus so Maria",
                        "Maria was better than Marcus so Marcus",
                    ],
                    "continuation": "got the easy cases.",
                    "gold": 1,
                },
                {
                    "context_options": ["The bed hid the dog, as the bed", "The bed hid the dog, as the dog"],
                    "continuation": "was big.",
                    "gold": 0,
                },
            )
        },
        SURGEON,
        ("Maria was better than Marcus so Marcus", " got the easy cases."),
    ),
    "winogrande, official": (
        "winogrande",
        {"winogrande_1.1/dev.jsonl": lines(*SURGEON)},
        SURGEON,
        ("Maria was better than Marcus so Maria", " got the easy cases."),
    ),
    "logiqa": (
        "logiqa",
        {
            "LogiQA/Test.txt": "\nd\nA park is in town.It has 3.5 trees.\nWhat follows?\nA.North. \nB.South\nC.East\n"
            "D.West\n\na\nOne.\nTwo?\nA.1\nB.2\nC.3\nD.4"
        },
        [PARK | {"options": ["North.", "South", "East", "West"]}]
        + [{"label": "a", "context": "One.", "question": "Two?", "options": ["1", "2", "3", "4"]}],
        (
            "Passage: A park is in town. It has 3. 5 trees.\nQuestion: What follows?\nChoices:\nA. North.\nB. South\n"
            "C. East\nD. West\nAnswer:",
            " West",
        ),
    ),
    "wsc": (
        "wsc",
        {
            "WSC/val.jsonl": lines(
                {
                    "text": OAT["text"],
                    "target": {key: value for key, value in OAT.items() if key != "text"},
                    "label": False,
                    "idx": 0,
                }
            )
        },
        # As in the Hub's "wsc.fixed", the span is as the text has it.
        [OAT | {"span1_text": "The dog", "label": 0}],
        (
            "Passage: The dog, which barked, ate the cookies because *it* was hungry.\nQuestion: In the passage above, "
            'does the pronoun "*it*" refer to "*The dog*"?\nAnswer:',
            " no",
        ),
    ),
    "hellaswag": (
        "hellaswag",
        {"hellaswag_val.jsonl": lines(HAND | {"ind": 24, "label": 2}, HAND | {"endings": ["a", "b"], "label": 0})},
        [HAND, HAND | {"endings": ["a", "b"], "label": "0"}],
        ("Washing hands: A man stands. The man", " runs. off."),
    ),
}


def requests(task):
    task.set_config("num_fewshot", 0)
    task.build_all_requests(rank=0, world_size=1)
    gold = [task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc) for doc in task.eval_docs]
    return [instance.args for instance in task.instances], gold


def write(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(content, encoding="utf-8")


@pytest.mark.parametrize("case", FORMATS)
def test_local_documents_give_the_built_in_questions(case, tmp_path):
    name, files, rows, request = FORMATS[case]
    write(tmp_path, files)
    manager = TaskManager(include_defaults=False, include_path=OWN, metadata={"local": str(tmp_path)})
    found = requests(manager.load([name])["tasks"][name])
    config = load_yaml(Path(lm_eval.tasks.__file__).parent / BUILT_IN[name])
    config.pop("tag", None)
    hub = dict.fromkeys(("train", "validation", "test"), Dataset.from_list(rows))
    assert found == requests(ConfigurableTask(config=config | {"custom_dataset": lambda **metadata: hub}))
    assert request in found[0]


def test_every_task_has_a_local_form():
    own = TaskManager(include_defaults=False, include_path=OWN)
    assert {*lm_eval_tasks.TASKS, "text_perplexity", "text_last_word"} == set(own.all_tasks)
    assert set(BUILT_IN) == set(lm_eval_tasks.TASKS) == {name for name, *_ in FORMATS.values()}


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    folder = tmp_path_factory.mktemp("documents")
    for name in ("arc_easy, foundry", "winogrande, foundry", "piqa", "lambada"):
        write(folder, FORMATS[name][1])
    write(folder, {"text.txt": "def f(x):\n    return x  # and so on, naïve\n" * 9})
    return folder


@pytest.fixture(scope="module")
def recurrent(workshop, tmp_path_factory):
    """A recurrent student that reads without this package."""
    return saved(workshop, tmp_path_factory.mktemp("recurrent"), tiny_student(modal=True, vocab_size=320).float())


@pytest.fixture(scope="module")
def exact(workshop, tmp_path_factory):
    """A recurrent student in float64."""
    student = tiny_student(modal=True, vocab_size=320)
    return Evaluated("exact", str(saved(workshop, tmp_path_factory.mktemp("exact"), student)), "float64")


def saved(workshop, folder, student):
    student.save_pretrained(folder)
    AutoTokenizer.from_pretrained(workshop / "teacher").save_pretrained(folder)
    return folder


def asked(documents, *tasks, **others):
    return Settings(48, tasks, local=str(documents), include=(OWN,), **others)


def values(result):
    return {entry["name"]: metrics.estimate(Metric(**entry)).value for entry in result["metrics"]}


def test_scores_are_the_harness_own(recurrent, documents, tmp_path):
    """Those of the harness with its own model class, which computes all logits."""
    names = ("arc_easy", "winogrande", "piqa", "lambada_openai", "text_perplexity")
    file = str(documents / "text.txt")
    settings = asked(documents, *names, text=text.read(file, split="all"), seed=3)
    model = Evaluated.parsed(f"ours={recurrent}")
    (result,) = lm_eval_tasks.of_models([model], settings, Results(None))
    found, scores = values(result), {}
    metadata = {"local": settings.local, "text": file}
    manager = TaskManager(include_defaults=False, include_path=OWN, metadata=metadata)
    theirs = HFLM(pretrained=model.model, tokenizer=model.tokenizer, backend="causal", max_length=48, batch_size=3)
    simple = lm_eval.simple_evaluate(theirs, tasks=list(names), task_manager=manager, bootstrap_iters=0)
    for task in names:
        for key, value in simple["results"][task].items():
            if key.endswith(",none") and "stderr" not in key:
                scores[f"{task} {key.removesuffix(',none')}"] = value
    assert found == pytest.approx(scores, rel=1e-5)  # 1e-6 measured, of a word perplexity of 4e8
    assert len(found) == 2 + 1 + 2 + 2 + 3
    assert {name: len(entry["numerators"]) for name, entry in zip(found, result["metrics"], strict=True)} == {
        "arc_easy acc": 2,
        "arc_easy acc_norm": 2,
        "winogrande acc": 2,
        "piqa acc": 3,
        "piqa acc_norm": 3,
        "lambada_openai perplexity": 2,
        "lambada_openai acc": 2,
        "text_perplexity word_perplexity": 1,
        "text_perplexity byte_perplexity": 1,
        "text_perplexity bits_per_byte": 1,
    }
    right = {sample["doc_id"]: sample["acc"] for sample in simple["samples"]["piqa"]}
    assert next(entry for entry in result["metrics"] if entry["name"] == "piqa acc")["numerators"] == [
        right[number] for number in range(3)
    ]
    assert [entry["name"] for entry in result["metrics"] if entry.get("headline")] == [
        "arc_easy acc",
        "winogrande acc",
        "piqa acc",
        "lambada_openai acc",
        "text_perplexity word_perplexity",
    ]
    assert result["settings"]["seed"] == 3 and result["versions"]["lm_eval"] == version("lm_eval")

    # And the stock command on the same folder, for whoever has no scavenger.
    code = "import sys; sys.modules['scavenger'] = None; from lm_eval.__main__ import cli_evaluate; cli_evaluate()"
    arguments = f"pretrained={recurrent},trust_remote_code=True,dtype=float32,max_length=48"
    words = [sys.executable, "-c", code, "run", "--model", "hf", "--device", "cpu", "--model_args", arguments]
    words += ["--include_path", OWN, "--tasks", *names, "--metadata", json.dumps(metadata)]
    home = LAUNCHED | {"HF_HOME": str(tmp_path / "home")}
    made = launch(*words, "--output_path", tmp_path / "stock.json", cwd=documents, env=home)
    assert made.returncode == 0, made.stderr
    stock = json.loads(next(tmp_path.glob("stock*.json")).read_text())["results"]
    assert found == pytest.approx({name: stock[name.split()[0]][f"{name.split()[1]},none"] for name in found}, rel=1e-5)


def test_tasks_of_a_text_read_its_documents(workshop, tmp_path, command):
    """By the column, of the split: the documents of eval/perplexity.py, and never the syntax of JSON."""
    records = [{"body": f'one\ntwo {number} of "these"', "id": number} for number in range(200)]
    write(tmp_path, {"text.jsonl": lines(*records)})
    words = ["--tasks", "text_perplexity", "--text", tmp_path / "text.jsonl", "--text-column", "body"]
    code, out, err = command(workshop / "teacher", *words)
    assert code == 0, err
    (result,) = json.loads(out.splitlines()[-1])
    read = text.read(str(tmp_path / "text.jsonl"), column="body")
    score = result["metrics"]["text_perplexity bits_per_byte"]
    assert score["items"] == len(read.documents) < 25 and result["settings"]["documents"] == read.name
    settings = Settings(48, ("text_perplexity",), include=(OWN,), text=read)
    asked = lm_eval_tasks.questions_of(settings).tasks["text_perplexity"]
    assert [asked.doc_to_target(document) for document in asked.eval_docs] == read.documents
    # The stock lm_eval reads plain text only.
    manager = TaskManager(include_defaults=False, include_path=OWN, metadata={"text": str(tmp_path / "text.jsonl")})
    for task in lm_eval_tasks.TEXT_TASKS:
        with pytest.raises(ValueError, match="found a table; expected a file of plain text"):
            manager.load([task])
    with pytest.raises(ValueError, match="found no text; expected --text"):
        TaskManager(include_defaults=False, include_path=OWN).load(["text_perplexity"])


def test_an_evaluation_goes_on_with_the_task_it_lacks(workshop, documents, tmp_path, monkeypatch):
    model = Evaluated(f"{workshop / 'teacher'}", f"{workshop / 'teacher'}")
    settings, results, of_task = asked(documents, "arc_easy", "piqa"), Results(tmp_path / "kept"), lm_eval_tasks.of_task
    measured = []

    def interrupted(model, task, *others):
        measured.append(task)
        if task == "piqa" and len(measured) == 2:
            raise KeyboardInterrupt
        return of_task(model, task, *others)

    monkeypatch.setattr(lm_eval_tasks, "of_task", interrupted)
    with pytest.raises(KeyboardInterrupt):
        lm_eval_tasks.of_models([model], settings, results)
    whole = lm_eval_tasks.of_models([model], settings, results)
    assert measured == ["arc_easy", "piqa", "piqa"]
    # All of it is there now: no model is loaded.
    again = Evaluated(model.label, model.path, loader=lambda: pytest.fail("the model was loaded"))
    assert lm_eval_tasks.of_models([again], settings, results) == whole
    # The same questions from another file are the same, in whatever form; other questions are not.
    write(tmp_path / "hub", {"arc_easy.jsonl": lines(SKY, ICE | {"answerKey": "2"}, SKY)})
    elsewhere = asked(tmp_path / "hub", "arc_easy", limit=2)
    assert (
        lm_eval_tasks.questions_of(elsewhere).digests
        == lm_eval_tasks.questions_of(asked(documents, "arc_easy")).digests
    )
    other_choice = ICE | {"choices": ICE["choices"] | {"text": ["heat", "the cold", "us", "me"]}}
    for other in (ICE | {"answerKey": "1"}, ICE | {"question": "Ice is cold as"}, other_choice):
        write(tmp_path / "hub", {"arc_easy.jsonl": lines(SKY, other, SKY)})
        assert (
            lm_eval_tasks.questions_of(elsewhere).digests
            != lm_eval_tasks.questions_of(asked(documents, "arc_easy")).digests
        )


def test_another_prompt_is_another_question(documents):
    task = lm_eval_tasks.questions_of(asked(documents, "arc_easy")).tasks["arc_easy"]
    seen = {lm_eval_tasks._digest(task, 3)}
    for key, value in (("description", "Answer. "), ("target_delimiter", ""), ("generation_kwargs", {"until": ["x"]})):
        task.set_config(key, value)
        seen.add(lm_eval_tasks._digest(task, 3))
    assert len(seen) == 4


def test_the_recurrent_student_is_evaluated_as_a_recurrence(workshop, exact, documents):
    """float64: log p of the harness' requests, and of their tokens read one by one with the states that they leave."""
    long = (workshop / "text.jsonl").read_text()[400:700]
    questions = [(long, " = self"), ("def f(x):", " return x"), ("", "import os")]
    instances = [Instance(request_type="loglikelihood", doc={}, arguments=arguments, idx=0) for arguments in questions]
    settings = asked(documents, "lambada_openai", "piqa")
    ours = lm_eval_tasks.language_model(exact, dataclasses.replace(settings, context_length=120))
    found = [value for value, _ in ours.loglikelihood(instances, disable_tqdm=True)]
    stepped = [by_steps(exact.model, exact.tokenizer, *arguments, length=120) for arguments in questions]
    assert found == pytest.approx(stepped, rel=1e-9)

    # The same for a whole task. Spaces at the end of a context count to what follows, as lm_eval does it.
    scores = values(lm_eval_tasks.of_task(exact, "lambada_openai", lm_eval_tasks.questions_of(settings), settings))
    pairs = [FORMATS["lambada"][3], ("a b", "  c")]
    stepped = -sum(by_steps(exact.model, exact.tokenizer, *pair, length=48) for pair in pairs)
    assert scores["lambada_openai perplexity"] == pytest.approx(math.exp(stepped / 2), rel=1e-7)


def by_steps(model, tokenizer, context, continuation, length):
    before = tokenizer(context)["input_ids"] or [tokenizer.eos_token_id]
    ids = (
        before + tokenizer(continuation)["input_ids"] if not context else tokenizer(context + continuation)["input_ids"]
    )
    count = len(ids) - len(before)
    ids, cache, total = ids[-(length + 1) :], None, 0.0
    for place, token in enumerate(ids[:-1]):
        with torch.no_grad():
            outputs = model(input_ids=torch.tensor([[token]]), cache=cache, use_cache=True)
        cache = outputs.cache
        if place >= len(ids) - 1 - count:
            total += outputs.logits[0, -1].log_softmax(-1)[ids[place + 1]].item()
    return total


@pytest.fixture
def command(monkeypatch, capsys):
    """eval/harness.py in this process: its exit code, what it prints, and what it says."""

    def run(*words):
        monkeypatch.setattr(sys, "argv", ["harness.py", *map(str, words)])
        code = runpy.run_path(str(ROOT / "eval/harness.py"))["main"]()
        return code, *capsys.readouterr()

    return run


def test_table_of_the_command(workshop, recurrent, documents, tmp_path, command):
    (tmp_path / "pythia-410m").symlink_to(workshop / "teacher")
    code, out, err = command(
        f"teacher={tmp_path / 'pythia-410m'}", f"ours={recurrent}", "--local", documents, "--limit", 2
    )
    assert code == 0, err
    for name in ("sciq", "logiqa", "wsc", "hellaswag", "arc_challenge"):
        assert f"{name} is left out: {name}: found no " in err
    assert "ours: winogrande" in err and "Running loglikelihood requests" in err
    *table, _, settings, last = out.splitlines()
    assert "limit 2" in settings and "context length 63" in settings
    rows = {row[:28].strip(): row[28:].split("  ") for row in table[2:]}
    cells = {name: [cell.strip() for cell in row if cell.strip()] for name, row in rows.items()}
    assert cells["hellaswag acc_norm"] == ["–", "–", "–"]
    assert cells["sciq acc"] == ["–", "81.1 %", "–"] and cells["logiqa acc"][::2] == ["–", "–"]
    assert cells["winogrande acc"][1] == "53.7 %" and "[" not in cells["winogrande acc"][0]
    assert set(cells) >= {f"{task} {metric}" for task, metric in lm_eval_tasks.HEADLINES.items()}
    teacher, published, ours = json.loads(last)
    assert (teacher["model"], published["model"], ours["model"]) == ("teacher", "teacher, published", "ours")
    assert teacher["metrics"]["piqa acc"]["items"] == 2 and published["source"]["license"] == "Apache-2.0"
    assert teacher["unmeasured"] == [
        "arc_challenge acc_norm",
        "sciq acc",
        "logiqa acc",
        "wsc acc",
        "hellaswag acc_norm",
    ]


def test_a_task_of_ones_own(workshop, tmp_path, command):
    yaml = """task: {}
custom_dataset: !function own.documents
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{text}}}}"
doc_to_target: label
doc_to_choice: [low, high]
metric_list: [{}]
"""
    source = """from datasets import Dataset
def documents(**metadata):
    return {"test": Dataset.from_list([{"text": word, "label": place % 2} for place, word in enumerate("abcde")])}
"""
    scores = {"own_both": "{metric: f1}, {metric: acc}", "own_f1": "{metric: f1}"}
    write(tmp_path, {f"{name}.yaml": yaml.format(name, score) for name, score in scores.items()} | {"own.py": source})
    words = (workshop / "teacher", "--include-path", tmp_path, "--tasks")
    code, out, err = command(*words, "own_both")
    assert code == 0 and "own_both: f1 is left out, it is no mean over questions" in err
    (result,) = json.loads(out.splitlines()[-1])
    assert result["metrics"]["own_both acc"]["items"] == 5 and len(result["metrics"]) == 1
    code, _, err = command(*words, "own_f1")
    assert code == 2 and "own_f1: found no score that is a mean over questions" in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tasks", "text_nothing"], "text_nothing is not a task of the harness nor of"),
        (["--tasks", "piqa"], "piqa: its documents cannot be read (Couldn't reach 'baber/piqa' on the Hub"),
        ([], "expected a reachable Hub, or --local FOLDER"),
        (["--tasks", "sciq", "--local", "data"], "sciq: found no sciq_test.jsonl or sciq_test.json or sciq/test.json"),
        (
            ["--local", "empty"],
            "found no documents of lambada_openai, arc_easy, arc_challenge, piqa, sciq, winogrande,",
        ),
        (["--local", "nowhere"], "found no folder nowhere"),
        (["--tasks", "arc_easy", "--local", "data"], "arc_easy.jsonl, line 3: found no JSON (Expecting"),
        (["--tasks", "winogrande", "--local", "data"], "winogrande.jsonl, line 1: found answer 3; expected 1 or 2"),
        (["--tasks", "piqa", "--local", "data"], "valid-labels.lst: found 2 labels; expected 3"),
        (["--tasks", "logiqa", "--local", "data"], "Test.txt, line 2: found 6 lines; expected 7: answer, passage"),
        (["--tasks", "wsc", "--local", "data"], "wsc_val.jsonl, line 1: found text, label; expected span1_text,"),
        (["--tasks", "lambada_openai", "--local", "data"], "Lambada_Test.jsonl; expected one lambada_test.jsonl"),
        (["--tasks", "arc_challenge", "--local", "data"], "line 1: found answer 4 of 3 options; expected 0 to 2"),
        (["--tasks", "hellaswag", "--local", "data"], "line 2: found bytes that are not UTF-8; expected text"),
        (["--tasks", "text_last_word", "--text", "nothing.txt"], "--text: nothing.txt is not there"),
        (["--tasks", "text_perplexity", "--text", "data/word.txt"], "found no document in the test split"),
        (["--tasks", "text_perplexity", "--text", "data/wsc_val.jsonl", "--text-column", "body"], "found columns text"),
        (
            ["--tasks", "text_last_word", "--text", "data/word.txt", "--split", "all"],
            "no paragraph of more than 10 words",
        ),
        (["--limit", "0"], "--limit: found 0; expected 1 or more"),
        (["--context-length", "1"], "found a context of 1 tokens; expected 2 or more"),
    ],
)
def test_the_command_refuses_in_a_line(words, message, workshop, tmp_path, monkeypatch, command):
    write(
        tmp_path / "data",
        {
            "word.txt": "word",
            "arc_easy.jsonl": f"{lines(SKY)}\nsky\n",
            "arc_challenge.jsonl": lines({"query": "Question: a", "choices": ["b", "c", "d"], "gold": 4}),
            "winogrande.jsonl": lines(SURGEON[0] | {"answer": "3"}),
            "piqa/valid.jsonl": lines(*PAIR),
            "piqa/valid-labels.lst": "0\n1\n",
            "logiqa/Test.txt": "\na\nOne.\nTwo?\nA.1\nB.2\nC.3\n\na\nOne.\nTwo?\nA.1\nB.2\nC.3\nD.4\n",
            "wsc_val.jsonl": lines({"text": "a b", "label": 1}),
            "one/lambada_test.jsonl": lines({"text": "a b"}),
            "two/Lambada_Test.jsonl": lines({"text": "a b"}),
        },
    )
    (tmp_path / "data/hellaswag_val.jsonl").write_bytes(lines(HAND).encode() + b"\xff\n")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    # The thousands of task files of the harness, of which none is asked for, take it 12 s to look through.
    monkeypatch.setattr(lm_eval.tasks.manager, "__file__", str(tmp_path / "empty/manager.py"))
    code, _, err = command(workshop / "teacher", *words)
    assert code == 2
    last = err.splitlines()[-1]
    assert last.startswith("harness: error: ") and message in last


def test_without_the_extra(workshop, monkeypatch, command):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    code, _, err = command(workshop / "teacher")
    assert code == 2 and err.splitlines()[-1].endswith("pip install 'scavenger[eval]'")


def test_published_scores(workshop, tmp_path):
    smallest = lm_eval_tasks.published("EleutherAI/pythia-70m")
    assert smallest["lambada_openai perplexity"] == pytest.approx(142.42891)
    assert smallest["arc_easy acc"] == pytest.approx(0.37373737) and smallest["wsc acc"] == pytest.approx(38 / 104)
    assert lm_eval_tasks.published("EleutherAI/pythia-1b") != lm_eval_tasks.published("EleutherAI/pythia-1b-deduped")
    models = json.loads(lm_eval_tasks.PYTHIA.read_text())["models"]
    assert len(models) == 16 and len({json.dumps(scores) for scores in models.values()}) == 16
    for name in models:
        found = lm_eval_tasks.published(f"EleutherAI/{name}")
        assert {f"{task} {metric}" for task, metric in lm_eval_tasks.HEADLINES.items()} - set(found) == {
            "hellaswag acc_norm"
        }
        assert all(math.isfinite(value) and value > 0 for value in found.values())
    assert lm_eval_tasks.published("EleutherAI/pythia-71m") == lm_eval_tasks.published("someone/pythia-70m") == {}
    assert lm_eval_tasks.published(str(workshop / "teacher")) == {}
    (tmp_path / "pythia-12b").mkdir()
    assert lm_eval_tasks.published(f"{tmp_path / 'pythia-12b'}/") == lm_eval_tasks.published("EleutherAI/pythia-12b")
