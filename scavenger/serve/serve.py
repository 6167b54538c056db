"""`scavenger serve`: a recurrent student behind the API of OpenAI, with continuous batching on the Decoder.

A request passes the gate (key, size, disconnects, its line in the log), is checked against a schema, becomes sequences
of the worker, and is answered from their tokens, whole or as server-sent events.
"""

import asyncio
import contextlib
import hmac
import logging
import os
import socket
import time
from dataclasses import dataclass

import prometheus_client
import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from scavenger.data import beginning
from scavenger.recipe import RecipeError
from scavenger.report.evaluated import Evaluated
from scavenger.serve.answer import Batch
from scavenger.serve.protocol import ChatCompletion, Completion, Refused, invalid
from scavenger.serve.worker import Failed, QueueFull, Worker


log = logging.getLogger(__package__)
KEY = "SCAVENGER_API_KEY"
BODY_BYTES = 2**22  # of a request: half a million tokens of English
PIECE = 512  # tokens of prompts that are read between two steps: a fifth of a second on two cores at 70 M parameters
CONTEXTS = 4  # training contexts that a sequence may have: a run's report measures perplexity no further
CLOSED_BY_CLIENT = 499  # nginx's status, in log and metrics alone: nobody is there to read it
OPEN = ("/health", "/metrics")  # without the key


@dataclass(frozen=True)
class Settings:
    """What the command line says; `max_length` counts prompt and new tokens, None: four training contexts.

    `state_dtype` is that in which the states of modes are kept between tokens.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    rows: int = 16
    queue: int = 256
    max_length: int | None = None
    grace: float = 30.0
    state_dtype: str = "float32"

    def __post_init__(self):
        for name, least in (("port", 0), ("rows", 1), ("queue", 0), ("max_length", 2), ("grace", 0)):
            value = getattr(self, name)
            if value is not None and not value >= least:
                raise RecipeError(f"--{name.replace('_', '-')}: found {value}; expected {least} or more")


def run(word: str, dtype: str, settings: Settings):
    """Serve the model of `FOLDER`, `NAME` or `LABEL=FOLDER` until SIGTERM or SIGINT.

    Raises RecipeError for a model whose state grows with the text, an address that is taken, and an empty key.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%Y-%m-%dT%H:%M:%S"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    key = os.environ.get(KEY)
    if key == "":
        raise RecipeError(f"{KEY}: found an empty value; expected a key, or no such variable")
    try:
        model = Evaluated.parsed(word, dtype)
    except ValueError as error:
        raise RecipeError(f"serve: {error}") from None
    require_recurrent(model)
    with bound(settings.host, settings.port) as listening:
        service = Service(model, settings, key)
        host, port = listening.getsockname()[:2]
        log.info(
            "%s at http://%s:%d/v1: %d rows, %d more may wait, up to %d tokens",
            *(model.label, host if ":" not in host else f"[{host}]", port),
            *(settings.rows, settings.queue, service.max_length),
        )
        asyncio.run(Server(service, settings.grace).serve([listening]))


def require_recurrent(model: Evaluated):
    """Raise RecipeError unless the model keeps a state of constant size."""
    if not model.is_student:
        raise RecipeError(
            f"{model.path}: found a {model.config.model_type} model, whose cache grows with the text; expected a "
            "recurrent student, such as the folder recurrence of a run"
        )
    if not model.is_recurrent:
        raise RecipeError(
            f"{model.path}: found a student whose filters are not recurrences yet; expected a "
            f"recurrent student: `scavenger recur {model.path}` makes one"
        )
    if model.config.state_grows:
        raise RecipeError(
            f"{model.path}: found attention to all tokens (attention_window: 0), whose state grows with the text; "
            "expected a student with an attention_window"
        )


def bound(host, port) -> socket.socket:
    """A listening socket; bound before a large model is loaded in vain."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        raise RecipeError(f"--host, --port: found {host}:{port} ({error}); expected a free address") from error


class Server(uvicorn.Server):
    """Ends in two steps: on a signal new requests get 503 while the running ones end, for `grace` seconds at most."""

    def __init__(self, service: "Service", grace: float):
        # What the clients of failed sequences are told must reach them: uvicorn waits for that, but not for ever.
        options = {"log_config": None, "access_log": False, "timeout_graceful_shutdown": 5}
        super().__init__(uvicorn.Config(Gate(service), lifespan="off", ws="none", **options))
        self.service, self.grace = service, grace

    async def serve(self, sockets=None):
        self.loop = asyncio.get_running_loop()
        self.service.worker.start(self.loop)
        try:
            await super().serve(sockets)
        finally:
            self.service.worker.close()

    def handle_exit(self, number, frame):
        """Called by a signal; a second one does not wait for the running requests."""
        if self.service.stopping:
            self.should_exit = self.force_exit = True
            return
        self.service.stopping = True
        self.ending = asyncio.run_coroutine_threadsafe(self._end(), self.loop)

    async def _end(self):
        log.info("stopping: %d requests are running", self.service.requests)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.grace):
                while self.service.requests:
                    await asyncio.sleep(0.05)
        await asyncio.to_thread(self.service.worker.close)
        self.should_exit = True


class Gate:
    """Around every request: the key, the size of its body, a client that goes away, one line in the log.

    Whatever ends a request, its sequences are cancelled: they leave their rows at the next step.
    """

    def __init__(self, service: "Service"):
        self.service, self.app = service, service.app

    async def __call__(self, scope, receive, send):
        service, began, status = self.service, time.monotonic(), CLOSED_BY_CLIENT
        scope["sequences"] = []

        async def noted(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        service.requests += 1
        try:
            if not await self._answered(scope, receive, noted):
                status = CLOSED_BY_CLIENT
        finally:
            service.requests -= 1
            sequences = scope["sequences"]
            service.worker.cancel(sequences)
            path = getattr(scope.get("route"), "path", "another path")  # the client's own could hold anything
            service.metrics.requests.labels(path, status).inc()
            log.info(
                "%s %s: %d, %d tokens of prompt, %d new ones, %.3f s",
                *(scope["method"], path, status),
                *(sum(len(each.prompt) for each in sequences), sum(each.length for each in sequences)),
                time.monotonic() - began,
            )

    async def _answered(self, scope, receive, send):
        """Answer one request; False if the client has gone before the end."""
        try:
            self._admit(scope)
            body = await _body(receive)
        except Refused as refused:
            await refused.response()(scope, receive, send)
            return True
        if body is None:
            return False
        gone = asyncio.create_task(_disconnect(receive))
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def replayed():
            return next(messages, None) or await asyncio.shield(gone)

        answer = asyncio.create_task(self.app(scope, replayed, send))
        try:
            await asyncio.wait([gone, answer], return_when=asyncio.FIRST_COMPLETED)
            if answer.done():
                answer.result()  # raises what it raised
            return answer.done()
        finally:
            gone.cancel()
            answer.cancel()
            await asyncio.gather(gone, answer, return_exceptions=True)

    def _admit(self, scope):
        if scope["path"] in OPEN:
            return
        if self.service.key is not None:
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + self.service.key.encode()):
                wanted = f"the key of the server ({KEY}) as Authorization: Bearer KEY"
                raise Refused(401, f"api_key: found none or a wrong one; expected {wanted}", code="invalid_api_key")
        if self.service.stopping:
            raise Refused(503, "the server is stopping; send the request to another one", retry=True)


async def _body(receive):
    """The whole body; None if the client has gone."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > BODY_BYTES:
            raise Refused(413, f"body: found more than {BODY_BYTES:,} bytes; expected no more")
        if not message.get("more_body"):
            return b"".join(parts)


async def _disconnect(receive):
    while (message := await receive())["type"] != "http.disconnect":
        pass
    return message


class Service:
    """The endpoints, and what they share."""

    def __init__(self, model: Evaluated, settings: Settings, key: str | None):
        self.name, self.key, self.tokenizer = model.label, key, model.tokenizer
        self.max_length = settings.max_length or CONTEXTS * model.training_context
        self.vocabulary, self.created = model.config.vocab_size, int(time.time())
        self.requests, self.stopping = 0, False
        ends = model.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        decoder = model.model.batch_decoder(settings.rows, getattr(torch, settings.state_dtype))
        places = settings.rows + settings.queue
        self.worker = Worker(decoder, {ends} if isinstance(ends, int) else set(ends), places, PIECE)
        self.metrics = Metrics(self.worker)
        self.encoding = asyncio.Lock()  # a tokenizer serves one thread at a time
        self.app = FastAPI(title="scavenger", openapi_url=None)
        for path, endpoint, method in (
            ("/v1/models", self.models, "GET"),
            ("/v1/completions", self.completions, "POST"),
            ("/v1/chat/completions", self.chat_completions, "POST"),
            ("/health", self.health, "GET"),
            ("/metrics", self.exposition, "GET"),
        ):
            self.app.add_api_route(path, endpoint, methods=[method])
        for kind, refusal in (
            (Refused, lambda error: error),
            (RequestValidationError, invalid),
            (HTTPException, lambda error: Refused(error.status_code, f"request: {error.detail}")),
            (Exception, lambda error: Refused(500, "the server failed; its log says more")),
        ):
            self.app.add_exception_handler(kind, lambda request, error, refusal=refusal: refusal(error).response())

    async def health(self) -> Response:
        if self.stopping or not self.worker.usable:
            return JSONResponse({"status": "stopping" if self.stopping else "the model has failed"}, 503)
        return JSONResponse({"status": "ok"})

    async def exposition(self) -> Response:
        made = prometheus_client.generate_latest(self.metrics.registry)
        return Response(made, media_type=prometheus_client.CONTENT_TYPE_LATEST)

    async def models(self) -> Response:
        about = {"id": self.name, "object": "model", "created": self.created, "owned_by": "scavenger"}
        return JSONResponse({"object": "list", "data": [about]})

    async def completions(self, ask: Completion, request: Request) -> Response:
        given = [ask.prompt] if isinstance(ask.prompt, str) or isinstance(ask.prompt[0], int) else ask.prompt
        self._require(ask, len(given))
        prompts = [await self._encoded(each) if isinstance(each, str) else each for each in given]
        for prompt in prompts:
            if (largest := max(prompt)) >= self.vocabulary:
                wrong = f"prompt: found token {largest}; expected ids below {self.vocabulary}"
                raise Refused(400, wrong, "prompt")
        echoed = [""] * len(prompts)
        if ask.echo:
            echoed = [each if isinstance(each, str) else self.tokenizer.decode(each) for each in given]
        return await self._answer(ask, request, prompts, echoed)

    async def chat_completions(self, ask: ChatCompletion, request: Request) -> Response:
        self._require(ask, 1)
        messages = [message.plain() for message in ask.messages]
        if not self.tokenizer.chat_template:
            wrong = "messages: the model's tokenizer has no chat template; expected a prompt at /v1/completions"
            raise Refused(400, wrong, "messages")
        try:
            # A template writes the special tokens itself.
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is the checkpoint's: what it raises has no common class
            reason = " ".join(str(error).split())[:200]
            wrong = f"messages: the chat template refuses them ({reason}); expected roles and an order that it knows"
            raise Refused(400, wrong, "messages") from error
        return await self._answer(ask, request, [await self._encoded(text, add_special_tokens=False)], [""])

    def _require(self, ask, prompts):
        """Refuse another model's name, and more choices than could ever wait, before anything is made of them."""
        if ask.model != self.name:
            wrong = f"model: found {ask.model!a}; expected {self.name!r}"
            raise Refused(404, wrong, "model", "model_not_found")
        choices = prompts * (ask.n or 1)
        if choices > self.worker.places:
            most = f"{self.worker.places:,} at most, as many as may run and wait"
            raise Refused(400, f"n: found {choices:,} choices for all prompts together; expected {most}", "n")

    async def _encoded(self, text, **options):
        """Its tokens; in a thread, as a long text takes a while. An empty prompt is the beginning of a document."""
        async with self.encoding:
            ids = (await asyncio.to_thread(self.tokenizer, text, verbose=False, **options)).input_ids
        return ids or [beginning(self.tokenizer)]

    async def _answer(self, ask, request, prompts, echoed):
        """Submit n sequences for each prompt, and answer from their tokens."""
        batch = Batch(self, ask)
        for prompt, echo in zip(prompts, echoed, strict=True):
            batch.add(prompt, self._new_tokens(ask, len(prompt)), echo)
        sequences = [choice.sequence for choice in batch.choices]
        try:
            self.worker.submit(sequences)
        except QueueFull:
            wrong = f"the queue is full: {self.worker.places:,} sequences run or wait; send the request again later"
            raise Refused(429, wrong, code="rate_limit_exceeded", retry=True) from None
        except Failed as failed:
            raise Refused(503, f"{failed}; send the request to another server") from None
        request.scope["sequences"] += sequences
        if ask.stream:
            never_cached = {"Cache-Control": "no-store"}
            return StreamingResponse(batch.events(), media_type="text/event-stream", headers=never_cached)
        return JSONResponse(await batch.whole())

    def _new_tokens(self, ask, read):
        """How many tokens may follow a prompt of `read`; Refused if they are more than there is room for."""
        room = self.max_length - read
        new = ask.new_tokens or max(1, min(room, ask.default_tokens or room))
        if new > room:
            wrong = f"{ask.subject}: found {read:,} tokens, and {new:,} new ones; expected {self.max_length:,} in all"
            raise Refused(400, wrong, ask.subject, "context_length_exceeded")
        return new


class Metrics:
    """What /metrics shows, in Prometheus' text format."""

    def __init__(self, worker: Worker):
        self.registry = prometheus_client.CollectorRegistry()
        own = {"namespace": "scavenger", "registry": self.registry}
        self.requests = prometheus_client.Counter("requests", "requests that ended", ["path", "status"], **own)
        self.read = prometheus_client.Counter("tokens_read", "prompt tokens of sequences that began", **own)
        self.generated = prometheus_client.Counter("tokens_generated", "new tokens", **own)
        buckets = [10 ** (power / 4) for power in range(-16, 9)]  # 0.1 ms to 100 s, four in each decade
        self.first = prometheus_client.Histogram(
            "time_to_first_token_seconds", "from the request to its first token", buckets=buckets, **own
        )
        self.rest = prometheus_client.Histogram(
            "seconds_per_token", "mean of a sequence, after its first token", buckets=buckets, **own
        )
        running = prometheus_client.Gauge("sequences_running", "rows that hold a sequence", **own)
        running.set_function(lambda: len(worker.running))
        waiting = prometheus_client.Gauge("sequences_waiting", "sequences that wait for a row", **own)
        waiting.set_function(lambda: len(worker.waiting))
