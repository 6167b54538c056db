"""The server: what its clients get is what the model writes alone, whoever else is served and whatever they send."""

import asyncio
import contextlib
import json
import logging
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest
import torch
from conftest import LAUNCHED, ROOT, command_line, tiny_student
from transformers import AutoTokenizer, TemperatureLogitsWarper, TopPLogitsWarper

from scavenger.recipe import RecipeError
from scavenger.report.evaluated import Evaluated
from scavenger.serve import serve, worker
from scavenger.serve.answer import Stops, Text


EMBEDDED = ROOT / "scavenger/assets/teacher-stdlib"
HANGS = 120  # seconds without end, on a machine however busy
ENDLESS = 10**6  # tokens: what nobody waits for
TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('no\nsystem') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A recurrent student with random weights, in float64, so that no two tokens are ever nearly as likely."""
    folder = tmp_path_factory.mktemp("served") / "tiny"
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    model = tiny_student(modal=True, vocab_size=len(tokenizer), attention_layers=[1], attention_window=7)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder):
    return Evaluated("tiny", str(folder), dtype="float64")


class Running:
    """A server in a thread of this process."""

    def __init__(self, model, key=None, grace=HANGS, **settings):
        settings = {"rows": 5, "queue": 200, "max_length": 2 * ENDLESS} | settings
        self.service = serve.Service(model, serve.Settings(**settings), key)
        self.worker = self.service.worker
        self.server = serve.Server(self.service, grace)
        self.listening = serve.bound("127.0.0.1", 0)
        self.address = f"http://127.0.0.1:{self.listening.getsockname()[1]}"
        self.thread = threading.Thread(target=asyncio.run, args=[self.server.serve([self.listening])])
        self.thread.start()
        options = {"base_url": f"{self.address}/v1", "api_key": key or "none", "max_retries": 0, "timeout": HANGS}
        self.client = openai.OpenAI(**options)
        self.own_client = lambda: openai.AsyncOpenAI(**options)

    def complete(self, prompt="def f(", **options):
        options = {"temperature": 0, "max_tokens": 9} | options
        return self.client.completions.create(model="tiny", prompt=prompt, **options)

    def post(self, path="/v1/completions", **options):
        return httpx.post(self.address + path, timeout=HANGS, **options)

    def metric(self, name):
        text = httpx.get(f"{self.address}/metrics", timeout=HANGS).text
        return sum(float(value) for value in re.findall(rf"^scavenger_{name}(?:{{.*}})? (\S+)$", text, flags=re.M))

    def stop(self):
        self.server.handle_exit(signal.SIGTERM, None)
        self.thread.join(HANGS)
        assert not self.thread.is_alive()


@contextlib.contextmanager
def running(*args, **options):
    found = Running(*args, **options)
    try:
        yield found
    finally:
        if found.thread.is_alive() and not found.service.stopping:
            found.stop()


@pytest.fixture(scope="module")
def server(evaluated):
    with running(evaluated) as found:
        yield found


def until(condition):
    """Wait for what other threads do."""
    deadline = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def alone(evaluated, prompt, new):
    """The text that transformers generates greedily after a prompt, and how many tokens it has."""
    ids = prompt if isinstance(prompt, list) else evaluated.tokenizer(prompt).input_ids
    found = evaluated.model.generate(
        torch.tensor([ids]), max_new_tokens=new, do_sample=False, pad_token_id=evaluated.tokenizer.pad_token_id
    )[0]
    return evaluated.tokenizer.decode(found[len(ids) :], skip_special_tokens=True), len(found) - len(ids)


def test_answers_are_the_models_own(server, evaluated):
    ids = evaluated.tokenizer("class A:").input_ids
    for prompt in ("import os", ids):
        text, new = alone(evaluated, prompt, 23)
        found = server.complete(prompt, max_tokens=23)
        assert found.choices[0].text == text and found.object == "text_completion"
        assert found.usage.completion_tokens == new == found.usage.total_tokens - found.usage.prompt_tokens
    both = server.complete(["import os", "class A:"], max_tokens=23, n=2, echo=True)
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in both.choices[::2]] == [
        prompt + alone(evaluated, prompt, 23)[0] for prompt in ("import os", "class A:")
    ]
    assert both.choices[1].text == both.choices[0].text
    (listed,) = server.client.models.list().data
    assert listed.id == "tiny"
    empty = server.complete("", max_tokens=5)
    assert empty.choices[0].text == alone(evaluated, [evaluated.tokenizer.bos_token_id], 5)[0]
    assert server.complete(max_tokens=None).usage.completion_tokens <= 16


def test_an_end_token_ends_the_text(evaluated, monkeypatch):
    prompt = "def f("
    ids = evaluated.tokenizer(prompt).input_ids
    whole = evaluated.model.generate(torch.tensor([ids]), max_new_tokens=9, do_sample=False)[0, len(ids) :].tolist()
    end = whole[4]
    monkeypatch.setattr(evaluated.model.generation_config, "eos_token_id", [97, end])
    before = whole[: whole.index(end)]
    with running(evaluated) as server:
        found = server.complete(prompt)
    assert found.choices[0].finish_reason == "stop" and found.usage.completion_tokens == len(before) + 1
    assert found.choices[0].text == evaluated.tokenizer.decode(before)


def test_64_streams_are_each_the_models_own(server, evaluated):
    """Prompts of many lengths, in five rows, with answers of many lengths."""
    draw = random.Random(3)
    asked = [([draw.randrange(2, 2048) for _ in range(1 + index % 37)], 3 + index % 7) for index in range(64)]
    read, generated = server.metric("tokens_read_total"), server.metric("tokens_generated_total")

    async def stream(client, prompt, new):
        options = {"temperature": 0, "stream": True, "stream_options": {"include_usage": True}}
        text, reasons, usage = "", [], None
        async for chunk in await client.completions.create(model="tiny", prompt=prompt, max_tokens=new, **options):
            for choice in chunk.choices:
                text += choice.text
                reasons.append(choice.finish_reason)
            usage = chunk.usage
        return text, reasons, usage.completion_tokens

    async def streams():
        async with server.own_client() as client:
            return await asyncio.gather(*(stream(client, *each) for each in asked))

    found = asyncio.run(streams())
    for (prompt, new), (text, reasons, tokens) in zip(asked, found, strict=True):
        expected, length = alone(evaluated, prompt, new)
        assert (text, tokens) == (expected, length)
        assert set(reasons[:-1]) <= {None} and reasons[-1] == ("length" if length == new else "stop")
    assert server.metric("tokens_read_total") - read == sum(len(prompt) for prompt, _ in asked)
    assert server.metric("tokens_generated_total") - generated == sum(tokens for *_, tokens in found)
    assert server.metric("time_to_first_token_seconds_count") >= 64 <= server.metric("seconds_per_token_count")


def test_a_client_that_goes_away_frees_its_row(evaluated):
    with running(evaluated, rows=2) as server:
        leaving, staying = (server.complete(stream=True, max_tokens=ENDLESS, logit_bias={}) for _ in range(2))
        for stream in (leaving, staying):
            next(stream)
        assert server.metric("sequences_running") == 2
        leaving.close()
        until(lambda: server.metric("sequences_running") == 1)
        assert server.complete().choices[0].text == alone(evaluated, "def f(", 9)[0]
        for _ in range(20):
            next(staying)
        # Not streamed: the connection is closed while the answer is made.
        body = json.dumps({"model": "tiny", "prompt": "x", "max_tokens": ENDLESS}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n"
        with socket.create_connection(server.listening.getsockname()) as connection:
            connection.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + body)
            until(lambda: server.metric("sequences_running") == 2)
        until(lambda: server.metric("sequences_running") == 1)
        assert server.metric('requests_total{path="/v1/completions",status="499"}') == 2
        staying.close()
        until(lambda: server.metric("sequences_running") == 0)


BODY = {"model": "tiny", "prompt": "x", "max_tokens": 3}
WRONG = [
    ({"temperature": float("nan")}, "temperature: found nan; expected a number from 0"),
    ({"temperature": float("inf")}, "temperature: found inf"),
    ({"temperature": -0.1}, "temperature: found -0.1"),
    ({"temperature": "0"}, "temperature: found '0'"),
    ({"top_p": 1.5}, "top_p: found 1.5"),
    ({"max_tokens": -1}, "max_tokens: found -1; expected a number of tokens from 1 on"),
    ({"max_tokens": 0}, "max_tokens: found 0"),
    ({"max_tokens": 2.5}, "max_tokens: found 2.5"),
    ({"max_tokens": True}, "max_tokens: found True"),
    ({"max_tokens": 10**30}, "prompt: found 1 tokens, and 1,000,000,000"),
    ({"n": 0}, "n: found 0"),
    ({"n": 10**12}, "n: found 1000000000000"),
    ({"n": 128, "prompt": ["x", "y"]}, "n: found 256 choices for all prompts together; expected 205 at most"),
    ({"prompt": None}, "prompt: found None"),
    ({"prompt": 5}, "prompt: found 5"),
    ({"prompt": []}, "prompt: found []"),
    ({"prompt": [[]]}, "prompt: found [[]]"),
    ({"prompt": ["a", [1]]}, "prompt: found ['a', [1]]"),
    ({"prompt": [-1]}, "prompt: found [-1]"),
    ({"prompt": [2048]}, "prompt: found token 2048; expected ids below 2048"),
    ({"prompt": [10**30]}, "prompt: found token 1000"),
    ({"prompt": "\ud800"}, "prompt: found '\\ud800'"),
    ({"stop": ""}, "stop: found ''"),
    ({"stop": ["a"] * 5}, "stop: found ['a', 'a'"),
    ({"seed": "a"}, "seed: found 'a'"),
    ({"stream": "yes"}, "stream: found 'yes'"),
    ({"stream_options": {"include": 1}}, "stream_options: found {'include': 1}"),
    ({"logprobs": 3}, "logprobs: found 3; expected none, as they are not supported"),
    ({"presence_penalty": 0.5}, "presence_penalty: found 0.5; expected 0"),
    ({"logit_bias": {"1": 2}}, "logit_bias: found {'1': 2}"),
    ({"best_of": 2}, "best_of: found 2"),
    ({"tools": []}, "tools: found a parameter that is not supported"),
    ({"messages": []}, "messages: found a parameter"),
]


@pytest.mark.parametrize("change, message", WRONG, ids=[f"{change}"[:40] for change, _ in WRONG])
def test_a_wrong_parameter_is_named(server, change, message):
    found = server.post(content=json.dumps(BODY | change), headers={"Content-Type": "application/json"})
    error = found.json()["error"]
    assert found.status_code == 400 and error["message"].startswith(message), error
    assert "\n" not in error["message"] and error["type"] == "invalid_request_error"
    assert error["param"] == message.partition(":")[0]


@pytest.mark.parametrize(
    "content, status, message",
    [
        (b"", 400, "body: found none; expected a JSON object"),
        (b"[]", 400, "body: found none"),
        (b"{", 400, "body: found malformed JSON"),
        (b'{"model": "tiny", "prompt": "\xff"}', 400, "request: "),
        (b'{"a":' * 100_000, 400, "request: "),
        (b'{"model": ' + b"9" * 5000 + b"}", 400, "request: "),
        (b'{"prompt": "x"}', 400, "model: found none; expected the model's name"),
        (b'{"model": "tiny"}', 400, "prompt: found none; expected a text"),
        (b'{"model": "other", "prompt": "x"}', 404, "model: found 'other'; expected 'tiny'"),
        (b'"' + b"a" * serve.BODY_BYTES + b'"', 413, "body: found more than 4,194,304 bytes"),
    ],
    ids=lambda value: None if isinstance(value, int) else repr(value[:20]),
)
def test_a_hostile_body_is_an_error_in_one_line(server, content, status, message):
    found = server.post(content=content, headers={"Content-Type": "application/json"})
    assert found.status_code == status and found.json()["error"]["message"].startswith(message), found.text
    assert "\n" not in found.json()["error"]["message"]


def test_other_requests_are_errors_of_the_same_form(server):
    plain = server.post(content=json.dumps(BODY), headers={"Content-Type": "text/plain"})  # any web page may send it
    assert plain.status_code == 400 and "expected a JSON object, with Content-Type" in plain.json()["error"]["message"]
    assert server.post("/v1/embeddings", json=BODY).json()["error"]["message"] == "request: Not Found"
    assert httpx.get(f"{server.address}/v1/completions").status_code == 405
    with pytest.raises(openai.BadRequestError, match="frequency_penalty: found 1.0; expected 0"):
        server.complete(frequency_penalty=1.0)
    assert server.complete(presence_penalty=0, frequency_penalty=0.0, best_of=1, user="me", seed=1).choices


def test_a_prompt_and_its_answer_have_room(evaluated):
    with running(evaluated, max_length=12) as server:
        assert server.complete([5] * 9, max_tokens=3).usage.total_tokens <= 12
        assert server.complete([5] * 9, max_tokens=None).usage.total_tokens <= 12
        for prompt, new in ((9, 4), (12, None), (30, 1)):
            with pytest.raises(openai.BadRequestError, match="expected 12 in all") as caught:
                server.complete([5] * prompt, max_tokens=new)
            assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_refuses(evaluated):
    with running(evaluated, rows=1, queue=1) as server:
        first = server.complete(stream=True, max_tokens=ENDLESS)
        next(first)
        second = server.complete(stream=True)
        assert server.metric("sequences_waiting") == 1
        with pytest.raises(openai.RateLimitError, match="the queue is full: 2 sequences") as caught:
            server.complete()
        assert caught.value.response.headers["Retry-After"] == "1"
        first.close()
        assert "".join(chunk.choices[0].text for chunk in second) == alone(evaluated, "def f(", 9)[0]


def test_a_text_ends_at_a_stop_string(server, evaluated):
    prompt = "import sys"
    text, new = alone(evaluated, prompt, 18)
    for begin in range(2, len(text) - 4, 5):
        stop = text[begin : begin + 4]
        expected = text[: text.index(stop)]
        found = server.complete(prompt, max_tokens=18, stop=["never in it", stop])
        assert (found.choices[0].text, found.choices[0].finish_reason) == (expected, "stop")
        assert found.usage.completion_tokens <= new
        stream = server.complete(prompt, max_tokens=18, stop=stop, stream=True)
        assert "".join(chunk.choices[0].text for chunk in stream) == expected
    found = server.complete(prompt, max_tokens=18, stop=text + "!")
    assert (found.choices[0].text, found.choices[0].finish_reason) == (text, "length")
    until(lambda: server.metric("sequences_running") == 0)


def test_stops_are_those_of_the_whole_text():
    """However the text is cut into pieces: the stop that is complete first, looked for letter by letter."""
    draw = random.Random(0)
    stopped = 0
    for _ in range(3000):
        text = "".join(draw.choices("ab", k=draw.randrange(12)))
        stops = ["".join(draw.choices("ab", k=draw.randrange(1, 5))) for _ in range(draw.randrange(4))]
        expected = text
        for end in range(len(text) + 1):
            complete = [stop for stop in stops if text[:end].endswith(stop)]
            if complete:
                expected = text[: end - max(map(len, complete))]
                stopped += 1
                break
        reader, found, done = Stops(stops), "", False
        begin = 0
        while not done:
            end = draw.randrange(begin, len(text) + 1)
            piece, done = reader.read(text[begin:end], last=end == len(text))
            found += piece
            begin, done = end, done or end == len(text)
        assert found == expected, (text, stops)
    assert 500 < stopped < 2900


def test_text_comes_in_whole_characters():
    tokenizer = AutoTokenizer.from_pretrained(EMBEDDED)
    written = "é😀 naïve 漢字\n\tend 🏳️‍🌈"
    for ids in (tokenizer(written).input_ids, [tokenizer(each).input_ids for each in written]):
        tokens = ids if isinstance(ids[0], int) else sum(ids, [])
        text = Text(tokenizer.decode, [])
        pieces = [text.add([token], last=False) for token in tokens]
        assert "".join(pieces) == written and not any("\ufffd" in piece for piece in pieces)
        assert len(tokens) > len(written) and pieces.count("") > 10
    draw = random.Random(1)
    for _ in range(50):  # any bytes, which are mostly no characters
        tokens = [draw.randrange(2, 2048 if draw.random() < 0.2 else 258) for _ in range(40)]
        text = Text(tokenizer.decode, [])
        pieces = [text.add([token], last=number == 39) for number, token in enumerate(tokens)]
        assert "".join(pieces) == tokenizer.decode(tokens)
        cut = Text(tokenizer.decode, [])
        assert "".join(cut.add([token], last=False) for token in tokens) + cut.add([], last=True) == "".join(pieces)


def test_a_conversation(server, evaluated):
    rendered = "<user>What is\tit?<assistant>"
    parts = [{"type": "text", "text": "What is"}, {"type": "text", "text": "\tit?"}]
    for content in ("What is\tit?", parts):
        messages = [{"role": "user", "content": content}]
        options = {"model": "tiny", "messages": messages, "temperature": 0}
        text, new = alone(evaluated, rendered, 21)
        whole = server.client.chat.completions.create(**options, max_completion_tokens=21)
        assert (whole.choices[0].message.content, whole.choices[0].message.role) == (text, "assistant")
        assert whole.usage.completion_tokens == new and whole.object == "chat.completion"
        chunks = list(server.client.chat.completions.create(**options, max_tokens=21, stream=True))
        assert chunks[0].choices[0].delta.role == "assistant" and chunks[-1].choices[0].finish_reason is not None
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == text
    for messages, message in (
        ([{"role": "system", "content": "x"}], "messages: the chat template refuses them (no system)"),
        ([], "messages: found []"),
        ([{"role": "user"}], "messages: found [{'role': 'user'}]"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}], "messages: found"),
    ):
        found = server.post("/v1/chat/completions", json={"model": "tiny", "messages": messages})
        assert found.status_code == 400 and found.json()["error"]["message"].startswith(message), found.text


def test_a_tokenizer_without_a_template(server, monkeypatch):
    monkeypatch.setattr(server.service.tokenizer, "chat_template", None)
    with pytest.raises(openai.BadRequestError, match="tokenizer has no chat template; expected a prompt"):
        server.client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x"}])


def test_a_seed_gives_the_same_text_whoever_else_is_served(server):
    options = {"temperature": 0.8, "top_p": 0.9, "max_tokens": 20, "n": 3}
    first = [choice.text for choice in server.complete(seed=11, **options).choices]
    assert len(set(first)) == 3
    others = [server.complete("x" * n, stream=True, max_tokens=ENDLESS, temperature=n / 3) for n in (1, 2)]
    for other in others:
        next(other)
    again = [choice.text for choice in server.complete(seed=11, **options).choices]
    for other in others:
        other.close()
    assert first == again
    assert first != [choice.text for choice in server.complete(seed=12, **options).choices]
    assert server.complete(temperature=1.5).choices[0].text != server.complete(temperature=1.5).choices[0].text
    greedy = server.complete().choices[0].text
    assert server.complete(temperature=2, top_p=0).choices[0].text == greedy  # the most likely token alone
    assert server.complete(temperature=1e-300).choices[0].text == greedy


def test_drawn_tokens_are_those_of_the_distribution():
    """transformers' own warpers, and a loop over the vocabulary."""
    generator = random.Random(5)
    counted = set()
    for _ in range(60):
        rows, vocabulary = generator.randrange(1, 7), generator.choice([1, 2, 31])
        logits = 3 * torch.randn(rows, vocabulary, dtype=torch.float64)
        asked = [(generator.uniform(0.1, 2), generator.choice([1.0, generator.random()])) for _ in range(rows)]
        numbers = [generator.choice([0.0, 1 - 2**-53, generator.random()]) for _ in range(rows)]
        temperature, top_p = torch.tensor(asked, dtype=torch.float64).T
        found = worker.drawn(logits, temperature, top_p, torch.tensor(numbers, dtype=torch.float64)).tolist()
        for row, (own, number) in enumerate(zip(asked, numbers, strict=True)):
            scores = TopPLogitsWarper(own[1])(None, TemperatureLogitsWarper(own[0])(None, logits[row : row + 1]))
            chances = scores.softmax(-1)[0].tolist()
            possible = [token for token, chance in enumerate(chances) if chance > 0]
            assert found[row] in possible
            expected, total = possible[-1], 0.0
            for token in possible:
                total += chances[token]
                if total > number:
                    expected = token
                    break
            assert found[row] == expected
            counted.add(found[row])
    assert len(counted) > 15
    many = torch.zeros(4000, 3, dtype=torch.float64)
    many[:, 1] = 1.0
    ones = torch.ones(4000, dtype=torch.float64)
    counts = worker.drawn(many, ones, ones, torch.rand(4000, dtype=torch.float64)).bincount() / 4000
    assert (counts - many[0].softmax(-1)).abs().max() < 0.03  # four standard deviations


def test_a_failed_step_fails_its_requests_alone(evaluated, monkeypatch, caplog):
    with running(evaluated, rows=2) as server:
        expected = server.complete().choices[0].text
        stream = server.complete(stream=True, max_tokens=ENDLESS)
        next(stream)
        step = server.worker.decoder.step

        def failing(tokens):
            monkeypatch.setattr(server.worker.decoder, "step", step)
            raise RuntimeError("out of memory, with\na secret")

        monkeypatch.setattr(server.worker.decoder, "step", failing)
        with pytest.raises(openai.APIError, match=r"the model failed \(RuntimeError\)"):
            list(stream)
        assert server.complete().choices[0].text == expected
        assert httpx.get(f"{server.address}/health").json() == {"status": "ok"}
        # A prompt that cannot be read, beside a sequence that goes on.
        staying = server.complete(stream=True, max_tokens=100)
        found = next(staying).choices[0].text
        adding = server.worker.decoder.adding
        calls = []

        def unreadable(prompts, tokens):
            calls.append(prompts)
            monkeypatch.setattr(server.worker.decoder, "adding", adding)
            yield
            raise RuntimeError("out of memory")

        monkeypatch.setattr(server.worker.decoder, "adding", unreadable)
        with pytest.raises(openai.InternalServerError, match="the model failed") as caught:
            server.complete()
        assert caught.value.status_code == 500 and len(calls) == 1
        assert server.complete().choices[0].text == expected
        found += "".join(chunk.choices[0].text for chunk in staying)
        assert found == alone(evaluated, "def f(", 100)[0]
    assert "a step failed" in caplog.text and "a prompt could not be read" in caplog.text


@pytest.mark.parametrize("fails", [False, True])
def test_a_long_prompt_is_read_between_steps(fails, evaluated, monkeypatch):
    """And again from its start, where a step of the others fails before its end."""
    monkeypatch.setattr(serve, "PIECE", 7)
    prompt = "def f(x, y):\n    return x + y\n\n" * 3
    tokens = len(evaluated.tokenizer(prompt).input_ids)
    with running(evaluated, rows=2) as server:
        decoder, events = server.worker.decoder, []
        adding, step = decoder.adding, decoder.step

        def piecewise(*words):
            for rows in adding(*words):
                events.append("piece" if rows is None else "entered")
                yield rows

        def stepping(*words):
            if fails and events.count("piece") == 2 and "failed" not in events:
                events.append("failed")
                raise RuntimeError("out of memory")
            events.append("step")
            return step(*words)

        staying = server.complete(stream=True, max_tokens=ENDLESS)
        next(staying)
        monkeypatch.setattr(decoder, "adding", piecewise)
        monkeypatch.setattr(decoder, "step", stepping)
        assert server.complete(prompt).choices[0].text == alone(evaluated, prompt, 9)[0]
        staying.close()
    pieces = -(-tokens // 7)
    assert pieces > 5 and events.count("piece") == pieces + 2 * fails and events.count("entered") == 1
    if not fails:
        first = events.index("piece")
        assert events[first : events.index("entered")] == ["piece", "step"] * pieces


def test_logits_that_are_not_finite_fail_their_own_row(evaluated, monkeypatch):
    with running(evaluated, rows=2) as server:
        decoder = server.worker.decoder
        staying = server.complete(stream=True, max_tokens=60)
        found = next(staying).choices[0].text
        adding = decoder.adding

        def poisoned(prompts, tokens):
            for rows in adding(prompts, tokens):
                for row in rows or []:
                    decoder.logits[row, 3] = float("nan")
                yield rows

        with monkeypatch.context() as patched:
            patched.setattr(decoder, "adding", poisoned)
            with pytest.raises(openai.InternalServerError, match="logits are not finite"):
                server.complete()
        assert found + "".join(chunk.choices[0].text for chunk in staying) == alone(evaluated, "def f(", 60)[0]
        assert server.complete().choices[0].text == alone(evaluated, "def f(", 9)[0]


def test_a_model_that_cannot_be_used_any_more(evaluated, monkeypatch):
    with running(evaluated, rows=2) as server:

        def broken(*args):
            raise RuntimeError("device-side assert")

        monkeypatch.setattr(server.worker.decoder, "step", broken)
        monkeypatch.setattr(server.worker.decoder, "reset", broken)
        with pytest.raises(openai.InternalServerError, match="the model failed"):
            server.complete()
        until(lambda: httpx.get(f"{server.address}/health").status_code == 503)
        with pytest.raises(openai.InternalServerError, match="the model has failed") as caught:
            server.complete()
        assert caught.value.status_code == 503


def test_a_key_is_asked_for_and_logged_nowhere(evaluated, caplog):
    with caplog.at_level(logging.INFO), running(evaluated, key="s3cret-é") as server:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "s3cret"}):
            found = server.post(json=BODY, headers=headers)
            assert found.status_code == 401 and found.json()["error"]["code"] == "invalid_api_key"
        assert httpx.get(f"{server.address}/v1/models").status_code == 401
        for path in ("/health", "/metrics"):
            assert httpx.get(server.address + path).status_code == 200
        given = {"Authorization": "Bearer s3cret-é".encode()}
        assert server.post(json=BODY | {"prompt": "a private text"}, headers=given).status_code == 200
        assert httpx.get(f"{server.address}/a private path").status_code == 401
    lines = [record.getMessage() for record in caplog.records if record.name == "scavenger.serve"]
    assert sum("POST" in line for line in lines) == 4 and any("200, 6 tokens of prompt, 3 new ones" in x for x in lines)
    assert not any("s3cret" in line or "private" in line for line in lines)


def test_a_stop_without_patience_says_so_to_the_clients(evaluated):
    with running(evaluated, grace=0.0, rows=1) as server:
        streams = [server.complete(stream=True, max_tokens=ENDLESS) for _ in range(2)]
        next(streams[0])
        server.stop()
        for stream in streams:  # one runs, one waits
            with pytest.raises(openai.APIError, match="the server is stopping"):
                list(stream)


def test_a_signal_lets_the_running_requests_end(folder):
    """In a process of its own, as it is typed."""
    words = [sys.executable, "-m", "scavenger", "serve", f"tiny={folder}", "--port", "0", "--rows", "2"]
    program = subprocess.Popen(
        [*words, "--max-length", "9000", "--grace", str(HANGS)],
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=LAUNCHED,
    )
    try:
        line = program.stderr.readline()
        assert "2 rows, 256 more may wait, up to 9000 tokens" in line, line
        address = re.search(r"http://\S+/v1", line)[0]
        client = openai.OpenAI(base_url=address, api_key="none", max_retries=0, timeout=HANGS)
        stream = client.completions.create(model="tiny", prompt=[5] * 3, max_tokens=800, stream=True, temperature=1.0)
        next(stream)
        program.send_signal(signal.SIGTERM)
        assert "stopping: 1 requests are running" in program.stderr.readline()
        with pytest.raises(openai.InternalServerError, match="the server is stopping") as caught:
            client.completions.create(model="tiny", prompt="x")
        assert caught.value.status_code == 503 and caught.value.response.headers["Retry-After"] == "1"
        assert httpx.get(address.removesuffix("/v1") + "/health").status_code == 503
        assert list(stream)[-1].choices[0].finish_reason in ("length", "stop")
        assert program.wait(HANGS) == 0
        assert "Traceback" not in program.stderr.read()
    finally:
        program.kill()
        program.wait()


def test_models_that_are_refused(tmp_path, folder, monkeypatch):
    exact = tmp_path / "exact"
    tiny_student().save_pretrained(exact)
    growing = tmp_path / "growing"
    tiny_student(modal=True, attention_layers=[1], attention_window=0).save_pretrained(growing)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        for words, message in (
            ([EMBEDDED], "found a gpt_neox model, whose cache grows with the text; expected a recurrent student"),
            (
                [exact],
                f"filters are not recurrences yet; expected a recurrent student: `scavenger recur {exact}` makes one",
            ),
            ([growing], "found attention to all tokens"),
            ([tmp_path / "none"], "cannot be loaded"),
            ([folder, "--rows", 0], "--rows: found 0; expected 1 or more"),
            ([folder, "--grace", "nan"], "--grace: found nan; expected 0 or more"),
            ([folder, "--port", 70000], "--host, --port: found 127.0.0.1:70000"),
            ([folder, "--port", taken.getsockname()[1]], "expected a free address"),
        ):
            found = command_line("serve", *words)
            assert found.returncode == 2 and message in found.stderr, found
            assert len(found.stderr.splitlines()) == 1, found.stderr
    monkeypatch.setenv("SCAVENGER_API_KEY", "")
    assert "SCAVENGER_API_KEY: found an empty value" in command_line("serve", folder).stderr


def test_without_the_extra(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    monkeypatch.delitem(sys.modules, "scavenger.serve.serve")
    monkeypatch.delattr("scavenger.serve.serve")
    found = command_line("serve", folder)
    expected = "scavenger: error: serve: uvicorn is not installed; expected pip install 'scavenger[serve]'\n"
    assert (found.returncode, found.stderr) == (2, expected)


def test_settings_have_bounds():
    with pytest.raises(RecipeError, match="--max-length: found 1; expected 2 or more"):
        serve.Settings(max_length=1)
