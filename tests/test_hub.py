"""A run goes to the Hub (a stand-in on loopback) and comes back the same, for whoever has not installed scavenger."""

import json
import re
import shutil
import socket
import subprocess
import sys

import pytest
import yaml
from conftest import BIN, LAUNCHED, ROOT, launch, tiny_of
from conftest import scavenger as whole_run
from hub_server import Commit, Hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from transformers import AutoTokenizer, GenerationConfig

from scavenger.hub import model_card, student_folder
from scavenger.recipe import Hub as Target
from scavenger.recipe import RecipeError, load_recipe
from scavenger.run.checkpoint import read_json


TOKEN = "hf_" + 9 * "ThisIsSecret"

# The command line as often as asked, without importing torch each time: a fork for each command.
CLIENT = """
import gc, json, os, sys, time
import scavenger.hub
from scavenger.__main__ import main
gc.freeze()  # a fork shares what is imported
time.sleep = lambda seconds: None  # the library waits half a minute in all between its attempts at an upload
for line in sys.stdin:
    given = json.loads(line)
    if (child := os.fork()) == 0:
        for number, name in enumerate(("out", "err"), 1):
            os.dup2(os.open(given[name], os.O_CREAT | os.O_WRONLY | os.O_TRUNC), number)
        os.environ["HF_TOKEN"] = given["token"]
        sys.argv = ["scavenger", *given["words"]]
        code = main()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # to take torch apart again costs more than the command
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""

# Whoever finds the model: no scavenger, no token, nothing but the repository's name.
READER = """
import contextlib, io, json, re, sys, threading
sys.modules["scavenger"] = None
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer, TextIteratorStreamer

name, run = sys.argv[1:]
found, local = (
    AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True) for where in (name, run + "/recurrence")
)
assert type(found).__module__.startswith("transformers_modules.")
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
encoded = dict(return_tensors="pt", return_token_type_ids=False)
texts = ["def main(", "import os\\n\\n\\nclass Path:\\n    def"]
ids = tokenizer(texts[1], **encoded)["input_ids"]
assert torch.equal(found(ids).logits, local(ids).logits)

found, local = found.double(), local.double()
arguments = dict(max_new_tokens=17, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=None)
for beams in (1, 3):
    out = found.generate(ids, num_beams=beams, **arguments)
    assert torch.equal(out, local.generate(ids, num_beams=beams, **arguments))
    assert torch.equal(out, found.generate(ids, num_beams=beams, use_cache=False, **arguments))
batch = tokenizer(texts, padding=True, **encoded)
assert (batch["attention_mask"][0] == 0).any()
together = found.generate(**batch, **arguments)[:, batch["input_ids"].shape[1] :]
for row, text in zip(together, texts, strict=True):
    one = tokenizer(text, **encoded)
    assert torch.equal(row, found.generate(**one, **arguments)[0, one["input_ids"].shape[1] :])
prompts = [tokenizer(text, **encoded)["input_ids"][0] for text in texts]
for row, new in zip(together, found.batch_decoder(rows=1).generate(prompts, 17, None), strict=True):
    assert torch.equal(row, new)
streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
thread = threading.Thread(target=found.generate, args=(ids,), kwargs=arguments | {"streamer": streamer})
thread.start()
assert "".join(streamer) == tokenizer.decode(together[1])
thread.join()

card = ModelCard.load(name)
code = re.search(r"```python\\n(.*?)```", card.text, flags=re.S)[1]
with contextlib.redirect_stdout(io.StringIO()) as printed:
    exec(code, {})
assert printed.getvalue().startswith("The first") and len(printed.getvalue()) > 20
print(json.dumps([[result.metric_type, result.metric_value] for result in card.data.eval_results]))
"""


@pytest.fixture(scope="module")
def hub():
    with Hub({TOKEN: "tester"}) as hub:
        hub.create("somebody/theirs", "somebody")
        yield hub


@pytest.fixture(scope="module")
def environment(hub, tmp_path_factory):
    without = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
    return {key: value for key, value in LAUNCHED.items() if key not in without} | {
        "HF_ENDPOINT": hub.address,
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
    }


@pytest.fixture(scope="module")
def scavenger(hub, environment, tmp_path_factory):
    """`scavenger(words …)` gives exit code, output and errors, and makes sure that the token is in none of them."""
    said = {name: tmp_path_factory.mktemp("said") / name for name in ("out", "err")}
    with subprocess.Popen(
        [sys.executable, "-c", CLIENT], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:

        def run(*words, token=TOKEN):
            given = {"words": [str(word) for word in words], "token": token} | {k: str(v) for k, v in said.items()}
            print(json.dumps(given), file=process.stdin, flush=True)
            code = int(process.stdout.readline())
            out, err = (path.read_text() for path in said.values())
            assert TOKEN not in out + err and TOKEN.encode() not in hub.stored()
            return code, out, err

        yield run
        process.stdin.close()


def one_line(err):
    assert err.startswith("scavenger: error: ") and err.count("\n") == 1, err
    assert "http" not in err and "Root=" not in err, "addresses and request numbers are the library's affair"
    return err


def test_a_pushed_run_comes_back_the_same(hub, environment, scavenger, finished, tmp_path):
    code, out, err = scavenger("push", finished, "--to", "tester/model")
    assert code == 0 and err == "" and f"{hub.address}/tester/model/commit/" in out
    repository = hub.repositories["tester/model"]
    assert len(repository.history()) == 2 and not repository.private
    local = {path.name: path.read_bytes() for path in (finished / "recurrence").iterdir()}
    files = dict(repository.files())
    assert set(files) - set(local) == {".gitattributes", "README.md"}
    assert all(files[name] == content for name, content in local.items())
    assert {"config.json", "model.safetensors", "tokenizer.json", "certificate.json"} <= set(files)
    code = {path.name for path in (ROOT / "scavenger/model").glob("*.py")} - {"__init__.py"}
    assert {name for name in files if name.endswith(".py")} == code

    code, _, err = scavenger("push", finished, "--to", "tester/model")
    assert code == 0 and err == "" and len(repository.history()) == 2, "nothing changed, nothing to commit"

    done = subprocess.run(
        [sys.executable, "-c", READER, "tester/model", str(finished)],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    ((kind, perplexity),) = json.loads(done.stdout.splitlines()[-1])
    expected = read_json(finished / "report/report.json")["models"]["recurrent"]["perplexity"]
    assert kind == "perplexity" and perplexity == pytest.approx(expected, abs=1e-4)


# The same for students of other families; those with a chat template answer messages.
FAMILIES = """
import sys
sys.modules["scavenger"] = None
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

messages = [{"role": "user", "content": "import os"}]
for pair in sys.argv[1:]:
    name, run = pair.split("=")
    found, local = (
        AutoModelForCausalLM.from_pretrained(where, trust_remote_code=True) for where in (name, run + "/recurrence")
    )
    assert type(found).__module__.startswith("transformers_modules.") and found.config.model_type == "hyena"
    tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        assert torch.equal(found(ids).logits, local(ids).logits)
    if tokenizer.chat_template:
        talk = pipeline("text-generation", model=found, tokenizer=tokenizer)
        (answer,) = talk(messages, max_new_tokens=5, do_sample=False)
        text = answer["generated_text"]
        assert text[:-1] == messages and text[-1]["role"] == "assistant" and isinstance(text[-1]["content"], str)
        kept = GenerationConfig.from_pretrained(name)
        assert (kept.temperature, kept.top_p, kept.eos_token_id) == (0.6, 0.9, [0, 7])
print("the same")
"""
TALK = (
    "{% for message in messages %}{{ message.role + ': ' + message.content }}"
    "{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)


def test_students_of_other_families_come_back_the_same(hub, environment, scavenger, workshop, tmp_path):
    """The whole way of each, and a push: teachers from folders with a chat template, and one trained in the run."""
    pairs = []
    for family in ("llama", "qwen3", "phi"):
        run, made = tmp_path / family, tmp_path / f"{family}-teacher"
        if family == "phi":
            own = [
                "teacher.path=null",
                "teacher.train={family: phi, hidden_size: 24, num_layers: 3, num_heads: 3, vocab_size: 320, steps: 4, "
                "batch_size: 4, learning_rate: 1e-2}",
            ]
        else:
            shutil.copytree(workshop / "teacher", made)
            tokenizer = AutoTokenizer.from_pretrained(made)
            tokenizer.chat_template = TALK
            tokenizer.save_pretrained(made)
            teacher = tiny_of(family, vocab_size=320)
            teacher.generation_config = GenerationConfig(
                do_sample=True, temperature=0.6, top_p=0.9, eos_token_id=[0, 7], bos_token_id=0
            )
            teacher.save_pretrained(made)
            own = [f"teacher.path={made}"]
        whole_run(
            workshop / "recipe.yaml",
            f"run_dir={run}",
            *own,
            "transfer.activations.steps=4",
            "transfer.logits.steps=4",
            "recurrence.max_state_size=6",
            "recurrence.method=balanced",
            "report.context_lengths=[20]",
            "report.cases=[]",
            "report.examples=1",
            "report.prompts=1",
            *([] if family == "phi" else ["report=null", "baseline=null"]),  # those of a family differ in no line
        )
        code, out, err = scavenger("push", run, "--to", f"tester/{family}")
        assert code == 0 and err == "", err
        pairs.append(f"tester/{family}={run}")
    done = subprocess.run(
        [sys.executable, "-c", FAMILIES, *pairs], capture_output=True, text=True, env=environment, cwd=tmp_path
    )
    assert done.stdout == "the same\n", done.stderr
    figures = json.loads((tmp_path / "phi/report/report.json").read_text())
    assert set(figures["models"]) == {"teacher", "pre-trained", "distilled", "recurrent"}


def test_branch_and_privacy(hub, scavenger, finished):
    words = ("push", finished, "--to", "tester/second", "--private", "--revision", "trials/first")
    assert scavenger(*words)[0] == 0
    repository = hub.repositories["tester/second"]
    assert repository.private
    assert set(repository.files("main")) == {".gitattributes"}
    assert "model.safetensors" in repository.files("trials/first")
    assert b'revision="trials/first"' in repository.files("trials/first")["README.md"]
    assert scavenger(*words)[0] == 0 and len(repository.history("trials/first")) == 2

    hub.create("tester/open", "tester")
    code, _, err = scavenger("push", finished, "--to", "tester/open", "--private")
    assert code == 2 and "tester/open exists and is public" in one_line(err)
    assert len(hub.repositories["tester/open"].history()) == 1


def test_weights_of_an_earlier_model_go(hub, scavenger, finished):
    """The loader prefers some names to others: what it could take for this model's must not stay."""
    repository = hub.create("tester/third", "tester")
    mine = {"notes.txt": b"mine", "steering.safetensors": b"y", "adapter/model.safetensors": b"z"}
    earlier = {"model-00001-of-00002.safetensors": b"x", "model.safetensors.index.json": b"{}"}
    earlier |= {"chat_template.jinja": b"{{ old }}"} | mine
    parent = repository.branches["main"]
    repository.add("main", Commit("earlier", earlier, frozenset(list(earlier)[:1]), parent))
    assert scavenger("push", finished, "--to", "tester/third")[0] == 0
    files = repository.files()
    assert set(earlier) & set(files) == set(mine), "what the loader does not read is not ours to take away"
    assert repository.history()[1:] == ["earlier", "initial commit"], "one commit takes and gives"


def test_an_upload_that_breaks_off_goes_on(hub, scavenger, finished):
    words = ("push", finished, "--to", "tester/fourth")
    hub.large.clear()
    hub.drop_uploads = True
    code, _, err = scavenger(*words)
    hub.drop_uploads = False
    assert code == 2 and "the upload to tester/fourth broke off" in one_line(err)
    assert f"everything in {finished} is kept: resume with `scavenger push {finished} --to tester/fourth`" in err
    assert hub.repositories["tester/fourth"].history() == ["initial commit"], "no half of a model"

    hub.broken = 503
    code, _, err = scavenger(*words)
    hub.broken = None
    assert code == 2 and "the Hub answered 503 (Service out of order)" in one_line(err)
    sent = sum(path.startswith("/upload/") for _, path in hub.requests)
    assert scavenger(*words)[0] == 0
    assert "model.safetensors" in hub.repositories["tester/fourth"].files()
    assert sum(path.startswith("/upload/") for _, path in hub.requests) == sent, "what had arrived is not sent again"


@pytest.mark.parametrize(
    ("name", "token", "parts"),
    [
        ("tester/model", "", ["found no token", "hf auth login", "resume with"]),
        ("tester/model", "hf_wrong", ["token was refused (401)", "hf auth login", "resume with"]),
        ("somebody/theirs", TOKEN, ["may not write to somebody/theirs (403)", "resume with"]),
        ("somebody/absent", TOKEN, ["may not write to somebody/absent (403)", "resume with"]),
        ("model", TOKEN, ["--to: found", '"model"', "user/repo"]),
        ("a/b/c", TOKEN, ["--to: found", "user/repo"]),
        ("tester/a--b", TOKEN, ["--to: found", "user/repo"]),
    ],
)
def test_mistakes_are_one_line(hub, scavenger, finished, name, token, parts):
    before = len(hub.repositories)
    code, out, err = scavenger("push", finished, "--to", name, token=token)
    assert code == 2 and out == ""
    for part in parts:
        assert part in one_line(err)
    assert len(hub.repositories) == before


def test_what_is_no_finished_run(scavenger, own_run, tmp_path):
    for folder, part in ((tmp_path, "found no recipe.yaml"), (tmp_path / "absent", "found no recipe.yaml")):
        code, _, err = scavenger("push", folder, "--to", "tester/model")
        assert code == 2 and f"{folder}: {part}" in one_line(err)
    code, _, err = scavenger("push", own_run, "--to", "tester/model", "--revision", "a..b")
    assert code == 2 and "--revision: found" in one_line(err)
    shutil.rmtree(own_run / "recurrence")
    code, _, err = scavenger("push", own_run, "--to", "tester/model")
    assert code == 2 and "the recipe asks for a recurrence, and the run has none yet" in one_line(err)
    (own_run / "transfer").rename(own_run / "transfer.partial")
    code, _, err = scavenger("push", own_run, "--to", "tester/model")
    assert code == 2 and "its transfer is not complete" in one_line(err)
    (own_run / "recipe.yaml").write_text("run_dir: [")
    (own_run / "transfer.partial").rename(own_run / "transfer")
    code, _, err = scavenger("push", own_run, "--to", "tester/model")
    assert code == 2 and "recipe.yaml: cannot be read" in one_line(err)


def test_a_hub_out_of_reach(environment, finished):
    with socket.socket() as taken:  # bound but not listening: whoever connects is refused
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
        done = subprocess.run(
            [BIN / "scavenger", "push", str(finished), "--to", "tester/model"],
            env=environment | {"HF_ENDPOINT": address, "HF_TOKEN": TOKEN},
            capture_output=True,
            text=True,
        )
    assert done.returncode == 2 and TOKEN not in done.stdout + done.stderr
    assert "the Hub was not reached" in one_line(done.stderr) and "resume with" in done.stderr


def test_a_recipe_pushes_at_its_end(hub, scavenger, workshop, own_run):
    words = [workshop / "recipe.yaml", f"run_dir={own_run}"]
    code, out, err = scavenger(*words, "hub.name=tester/fifth", token="")
    assert code == 2 and out == "" and "found no token" in one_line(err), "before anything is done"
    code, out, _ = scavenger(*words, "hub.name=tester/fifth", "hub.private=true", "--plan", token="")
    assert code == 0 and "the student is pushed to tester/fifth (branch main, private)" in out

    code, out, err = scavenger(*words, "hub.name=somebody/theirs")
    assert code == 2 and "may not write to somebody/theirs" in err
    assert f"everything in {own_run} is kept: resume with `scavenger push {own_run} --to somebody/theirs`" in err
    assert "Traceback" not in err and "tester/fifth" not in hub.repositories

    code, out, err = scavenger(*words, "hub.name=tester/fifth", "hub.private=true")
    assert code == 0 and "/tester/fifth/commit/" in out, "the place is no other recipe"
    assert hub.repositories["tester/fifth"].private and "model.safetensors" in hub.repositories["tester/fifth"].files()
    for path in own_run.rglob("*"):
        assert path.is_dir() or TOKEN.encode() not in path.read_bytes(), path


def test_two_processes_are_one_and_push_once(hub, environment, finished, workshop, tmp_path):
    """The whole way on two CPU processes with two micro-batches each: every loss, one report, one push."""
    begun, run = len(hub.requests), tmp_path / "run"
    words = ["--config_file", "accelerate_configs/cpu_two_processes.yaml", workshop / "recipe.yaml", f"run_dir={run}"]
    words += ["training.accumulate=2", "hub.name=tester/sixth"]
    done = launch("accelerate", "launch", *words, env=environment | {"HF_TOKEN": TOKEN})
    assert done.returncode == 0, done.stderr
    for stage in ("transfer/activations", "transfer", "baseline"):
        losses = [[entry["loss"] for entry in read_json(r / stage / "history.json")] for r in (run, finished)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-3), stage
    assert done.stdout.count("× teacher") == 1 and (run / "report/index.html").is_file()
    assert read_json(run / "recurrence/certificate.json")["filters"] == 15
    assert TOKEN not in done.stdout + done.stderr
    assert hub.requests[begun:].count(("POST", "/api/repos/create")) == 1
    assert len(hub.repositories["tester/sixth"].history()) == 2


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["hub.name=model"], ["hub.name", "model", "user/repo"]),
        (["hub.name=tester/model.git"], ["hub.name", "user/repo"]),
        (["hub.private=true"], ["hub.name", "nothing", "text"]),
        (["hub.name=tester/model", "hub.private=perhaps"], ["hub.private", "perhaps", "true or false"]),
        (["hub.name=tester/model", "hub.revision=a b"], ["hub.revision", "a b", "branch"]),
        (["hub.name=tester/model", "hub.tokn=x"], ["hub.tokn", "unknown key"]),
    ],
)
def test_mistakes_in_a_recipe(overrides, parts):
    with pytest.raises(RecipeError) as error:
        load_recipe(str(ROOT / "recipes/quickstart.yaml"), overrides)
    for part in parts:
        assert part in str(error.value) and "\n" not in str(error.value)


def test_the_card_says_what_the_run_found(finished, workshop):
    figures, found = read_json(finished / "report/report.json"), read_json(finished / "recurrence/certificate.json")
    card = model_card(finished, Target("tester/model"))
    assert card.data.license == "unknown" and "could not be found" in card.text
    metadata = card.data.to_dict()
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-generation"
    assert "base_model" not in metadata and "datasets" not in metadata, "they are local folders"
    rows = [line.split(" | ") for line in card.text.splitlines() if line.startswith("| ")]
    assert [row[0].removeprefix("| ") for row in rows[2:]] == list(figures["models"])
    for row, model in zip(rows[2:], figures["models"].values(), strict=True):
        assert row[1] == f"{model['parameters']:,}" and row[3] == f"{model['perplexity']:.3f}"
    worst = max((f for layer in found["layers"] for f in layer["filters"]), key=lambda f: f["relative_error"])
    for fact in (
        found["verdict"],
        f"worst filter: relative l2 error {worst['relative_error']:.2e}",
        f"as many states: {worst['floor']:.2e}",
        f"largest |pole|: {found['largest_radius']:.4f}",
        f"KL {found['model']['divergence']:.2e} nats per token",
        "in contexts of 48 tokens, on 3,840 tokens of `text.jsonl`",
        f"torch {read_json(finished / 'environment.json')['torch']}",
        "Compared with teacher, recurrent is ",
        "2401.17574",
        "2310.18780",
        "2302.10866",
    ):
        assert fact in card.text, fact
    assert str(workshop) not in card.content and str(finished.parent) not in card.content
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", card.text, flags=re.S)[1])
    assert shown["data"]["path"] == "text.jsonl" and shown["teacher"]["path"] == "teacher" and shown["run_dir"] == "run"
    assert shown["transfer"] == yaml.safe_load((finished / "recipe.yaml").read_text())["transfer"]


def test_the_metadata_is_what_huggingface_hub_reads(finished, own_run):
    """It reads the card's YAML as the data that made it, and the model index as one whole result."""
    perplexity = read_json(finished / "report/report.json")["models"]["recurrent"]["perplexity"]
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["teacher"] |= {"path": None, "name": "somebody/theirs"}
    values["data"] |= {"path": None, "name": "somebody/text", "subset": "small", "revision": 40 * "a"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    for run, dataset, config, base in (
        (finished, "text.jsonl", None, None),
        (own_run, "somebody/text", "small", "somebody/theirs"),
    ):
        card = model_card(run, Target("tester/model"))
        read = ModelCard(str(card), ignore_metadata_errors=False)
        assert read.data.to_dict() == card.data.to_dict() and read.text == card.text
        (result,) = read.data.eval_results
        assert result.task_type == "text-generation" and result.metric_type == "perplexity"
        assert (result.dataset_type, result.dataset_split) == (dataset, "test") and result.dataset_name
        assert result.dataset_config == config and isinstance(result.metric_value, float)
        assert result.metric_value == pytest.approx(perplexity, abs=1e-4)
        again = model_index_to_eval_results(eval_results_to_model_index("model", [result]))
        assert again == ("model", [result])
        written = yaml.safe_load(str(card).split("---\n")[1])
        assert written == read.data.to_dict() and written.get("base_model") == base
        # Of one type each, as the Hub's schema has them.
        kinds = {"library_name": str, "license": str, "pipeline_tag": str, "tags": list, "model-index": list}
        kinds |= {"base_model": str, "datasets": list}
        assert all(isinstance(value, kinds[key]) for key, value in written.items())
        assert written["pipeline_tag"] == "text-generation"


def test_the_card_of_a_window_alone(own_run):
    """A student without filters has neither long convolutions nor recurrences to speak of."""
    path = own_run / "recurrence/config.json"
    changes = {"num_filters": 0, "window": 9, "state_sizes": [[], [], []]}
    path.write_text(json.dumps(read_json(path) | changes))
    (own_run / "recurrence/certificate.json").unlink()
    text = model_card(own_run, Target("tester/model")).text
    assert "- layers 0, 1, 2: softmax attention over the last 9 tokens" in text
    assert "convolutions" not in text.split("## Use")[0] and "poles and residues" not in text


def test_the_card_of_an_older_run(own_run):
    """A report without what later ones have; folders that were given where Hub names go."""
    figures = read_json(own_run / "report/report.json")
    for row in figures["models"].values():
        row.pop("break_even_length", None)
        row.pop("ratio_interval", None)
    figures.pop("comparison")
    (own_run / "report/report.json").write_text(json.dumps(figures))
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["teacher"] |= {"path": None, "name": "/home/somebody/secret/pythia"}
    values["data"] |= {"path": None, "name": "../clients/__acme__ *corpus*"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    card = model_card(own_run, Target("tester/model"))
    assert "between tokens." in card.text and "more with every token" not in card.text
    assert "secret" not in card.content and "clients" not in card.content and "huggingface.co//" not in card.content
    assert "`pythia`" in card.text and "`__acme__ *corpus*`" in card.text
    assert card.data.eval_results[0].dataset_type == "__acme__-corpus"
    figures["models"].pop("recurrent")
    (own_run / "report/report.json").write_text(json.dumps(figures))
    assert not model_card(own_run, Target("tester/model")).data.eval_results


def test_nothing_that_is_pushed_names_a_private_folder(hub, scavenger, own_run, finished, tmp_path):
    secret = tmp_path / "secret-client"
    (secret / "tasks").mkdir(parents=True)
    (tmp_path / "link").symlink_to(secret)
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["cache"] = {"folder": "~/secret-client/cache", "activations": True, "logits": None}
    values["teacher"] |= {"path": str(secret / "teacher"), "revision": f"{secret}/revision"}
    values["data"] |= {"path": str(tmp_path / "link"), "text_column": "../secret-client/column"}
    values["report"] |= {
        "tasks_path": "secret-client/questions",
        "task_files": [str(secret / "tasks"), "secret-client/a"],
    }
    values["training"]["tracker"] = f"file://{secret}/log"
    values["run_dir"] = "runs/secret-client/mine"
    values["transfer"]["logits"] = [{"steps": 3, "notes": [{"deep": "./secret-client/deep"}]}]
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    folder = own_run / "recurrence"
    tokens = {"pad_token": "/pad", "added_tokens_decoder": {"0": {"content": "~/token"}}}
    for name, keys in (
        (
            "tokenizer_config.json",
            {"name_or_path": f"{secret}/tokenizer", "files": [{"vocab_file": f"{secret}/v.json"}]},
        ),
        ("config.json", {"_name_or_path": "~/secret-client/model"}),
        ("generation_config.json", {"_name_or_path": str(secret / "model")}),
        ("certificate.json", {"text": f"{secret}/text.txt"}),
        ("training.json", {"teacher": {"path": "secret-client/teacher"}}),
        ("history.json", [{"where": f"{secret}/history"}]),
    ):
        before = read_json(folder / name) if (folder / name).is_file() else {}
        changed = before | tokens | keys if isinstance(keys, dict) else keys
        (folder / name).write_text(json.dumps(changed))
    vocabulary = (folder / "tokenizer.json").read_bytes()
    assert scavenger("push", own_run, "--to", "tester/private-paths")[0] == 0
    files = hub.repositories["tester/private-paths"].files()
    assert {"history.json", "training.json", "README.md"} <= set(files) and files["tokenizer.json"] == vocabulary
    for name, content in files.items():
        for private in ("secret-client", tmp_path, finished.parent):  # the last is where the run was made
            assert str(private).encode() not in content, name
    configuration = json.loads(files["tokenizer_config.json"])
    assert configuration["name_or_path"] == "tokenizer" and configuration["files"] == [{"vocab_file": "v.json"}]
    assert configuration["pad_token"] == "/pad" and configuration["added_tokens_decoder"]["0"]["content"] == "~/token"
    shown = yaml.safe_load(re.search(r"```yaml\n(.*?)```", files["README.md"].decode(), flags=re.S)[1])
    assert shown["cache"]["folder"] == "cache" and shown["report"]["task_files"] == ["tasks", "a"]
    assert shown["data"]["path"] == "link" and shown["run_dir"] == "mine"
    assert shown["student"] == values["student"] and shown["recurrence"] == values["recurrence"]


def test_names_are_code_in_the_card(own_run):
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["teacher"] |= {"path": "/models/a`__b__\n<i>", "name": None}
    values["data"] |= {"path": None, "name": "some_body/_text_"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    text = model_card(own_run, Target("tester/model")).text
    assert "from `a__b__ <i>`, a Transformer of 3 layers" in text and "tokens of `some_body/_text_`" in text


def test_the_card_of_less(hub, scavenger, own_run):
    """No report, no recurrence; a teacher of the Hub, whose licence is asked for there; text of the Hub."""
    shutil.rmtree(own_run / "report")
    shutil.rmtree(own_run / "recurrence")
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["recurrence"] = values["report"] = None
    values["teacher"] |= {"path": None, "name": "somebody/theirs"}
    values["data"] |= {"path": None, "name": "somebody/text"}
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    theirs = hub.repositories["somebody/theirs"]
    licence = b"---\nlicense: other\nlicense_name: their-own\nlicense_link: LICENSE\n---\n# theirs\n"
    theirs.add("main", Commit("card", {"README.md": licence}, frozenset(), theirs.branches["main"]))
    assert scavenger("push", own_run, "--to", "tester/less")[0] == 0
    files = hub.repositories["tester/less"].files()
    assert files["model.safetensors"] == (student_folder(own_run) / "model.safetensors").read_bytes()
    assert "history.json" in files and "certificate.json" not in files and not any("/" in name for name in files)
    card = files["README.md"].decode()
    metadata = yaml.safe_load(card.split("---\n")[1])
    assert (
        metadata["license"] == "other"
        and metadata["license_name"] == "their-own"
        and metadata["license_link"] == "https://huggingface.co/somebody/theirs/blob/main/LICENSE"
        and "the teacher's licence applies: their-own" in card
    )
    assert metadata["base_model"] == "somebody/theirs" and metadata["datasets"] == ["somebody/text"]
    assert "model-index" not in metadata and "nothing was measured or compared" in card
    assert "Certificate" not in card and "keeps the inputs of all its long convolutions" in card


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        (None, "apache-2.0"),  # the embedded teacher's own
        ("---\nlicense: cc-by-4.0\n---\n# a teacher\n", "cc-by-4.0"),
        ("# a teacher without metadata\n", "unknown"),
        ("---\nlicense: [broken\n---\n", "unknown"),
    ],
)
def test_the_licence_is_the_teachers(own_run, tmp_path, card, licence):
    values = yaml.safe_load((own_run / "recipe.yaml").read_text())
    values["teacher"]["path"] = None if card is None else str(tmp_path)
    (own_run / "recipe.yaml").write_text(yaml.safe_dump(values))
    (tmp_path / "README.md").write_text(card or "")
    made = model_card(own_run, Target("tester/model"))
    assert made.data.license == licence
    assert ("could not be found" in made.text) == (licence == "unknown")


@pytest.mark.parametrize(
    ("window", "parts"),
    [
        (7, ["layer 1: the teacher's attention, over the last 7 tokens", "further than 7 tokens", "the same time"]),
        (0, ["over all earlier tokens", "state of the kept attention grows", "keeps every key and value"]),
    ],
)
def test_the_card_says_what_attention_is_kept(own_run, window, parts):
    config = read_json(own_run / "recurrence/config.json") | {"attention_layers": [1], "attention_window": window}
    (own_run / "recurrence/config.json").write_text(json.dumps(config))
    text = model_card(own_run, Target("tester/model")).text
    assert "layers 0, 2: multihyena, 5 long filters per layer, each over 6 channels" in text
    for part in parts:
        assert part in text
    assert ("however long the text before it is" in text) == (window > 0)
