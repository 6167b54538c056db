"""From tokens to an answer: text in whole characters, up to a stop string, whole or as server-sent events."""

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Callable

from scavenger.serve.protocol import Ask, Refused
from scavenger.serve.worker import Failed, Sequence


INCOMPLETE = "\ufffd"  # what decoding puts where a character's bytes are not all there
BEFORE = 4  # tokens of a prompt that its continuation is decoded with: some tokenizers drop a first token's space


class Batch:
    """The choices of one request, and its answer from the tokens that the worker delivers."""

    def __init__(self, service, ask: Ask):
        self.service, self.ask = service, ask
        self.choices: list[Choice] = []
        self.delivered: asyncio.Queue[tuple[Choice, int | Failed, str | None]] = asyncio.Queue()
        self.prompt_tokens = 0
        self.about = {"id": ask.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": service.name}

    def add(self, prompt: list[int], max_tokens: int, echo: str):
        """Continue a prompt n times; each choice draws its tokens by the seed and its own index."""
        self.prompt_tokens += len(prompt)
        for _ in range(self.ask.n or 1):
            self.choices.append(Choice(self, prompt, max_tokens, echo))

    async def whole(self) -> dict:
        """The answer that is not streamed; Refused if a sequence fails."""
        texts = [choice.echo for choice in self.choices]
        async for choice, text in self._texts():
            texts[choice.index] += text
        answers = [
            {"index": choice.index, **self.ask.choice(text), "finish_reason": choice.reason}
            for choice, text in zip(self.choices, texts, strict=True)
        ]
        return {**self.about, "object": self.ask.kind, "choices": answers, "usage": self._usage()}

    async def events(self) -> AsyncIterator[str]:
        """The answer as server-sent events; a sequence that fails ends it with an error."""
        usage = self.ask.stream_options is not None and self.ask.stream_options.include_usage
        head = {**self.about, "object": self.ask.chunk_kind} | ({"usage": None} if usage else {})
        for choice in self.choices:
            if (opening := self.ask.opening(choice.echo)) is not None:
                yield _event({**head, "choices": [{"index": choice.index, **opening, "finish_reason": None}]})
        try:
            async for choice, text in self._texts():
                piece = {"index": choice.index, **self.ask.piece(text), "finish_reason": choice.reason}
                yield _event({**head, "choices": [piece]})
        except Refused as refused:
            yield _event(refused.body)
            return
        if usage:
            yield _event({**head, "choices": [], "usage": self._usage()})
        yield "data: [DONE]\n\n"

    async def _texts(self):
        """Each choice with a piece of its text, until all have ended."""
        left = len(self.choices)
        while left:
            choice, token, reason = await self.delivered.get()
            if isinstance(token, Failed):
                raise Refused(500 if token.usable else 503, f"{token}; the other requests go on")
            if choice.reason is not None:  # generated before the worker knew of a stop string
                continue
            text = choice.read(token, reason)
            if choice.reason is not None:
                left -= 1
                self.service.worker.cancel([choice.sequence])
            if text or choice.reason is not None:
                yield choice, text

    def _usage(self):
        new = sum(choice.tokens for choice in self.choices)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": new,
            "total_tokens": self.prompt_tokens + new,
        }


class Choice:
    """One continuation: its sequence of tokens, the text of those read so far, and why it ended."""

    def __init__(self, batch: Batch, prompt: list[int], max_tokens: int, echo: str):
        ask, service = batch.ask, batch.service
        self.batch, self.metrics, self.index, self.echo = batch, service.metrics, len(batch.choices), echo
        self.tokens, self.reason, self.began, self.first = 0, None, time.monotonic(), None
        before = [] if ask.subject == "messages" else prompt[-BEFORE:]
        self.text = Text(lambda ids: service.tokenizer.decode(ids, skip_special_tokens=True), before)
        self.stops = Stops(ask.stops)
        numbers = random.Random() if ask.seed is None else random.Random(f"{ask.seed} {self.index}")
        temperature, top_p = (1.0 if value is None else value for value in (ask.temperature, ask.top_p))
        self.sequence = Sequence(prompt, max_tokens, temperature, top_p, numbers, self.deliver)

    def deliver(self, token: int | Failed, reason: str | None):
        """Called by the worker in the event loop."""
        self.batch.delivered.put_nowait((self, token, reason))
        if isinstance(token, Failed):
            return
        now = time.monotonic()
        self.metrics.generated.inc()
        if self.first is None:
            self.first = now
            self.metrics.read.inc(len(self.sequence.prompt))
            self.metrics.first.observe(now - self.began)
        elif reason is not None:
            self.metrics.rest.observe((now - self.first) / (self.sequence.length - 1))

    def read(self, token: int, reason: str | None) -> str:
        """The text that is settled by this token, of which `reason` says whether it is the last, and why."""
        self.tokens += 1
        ends = reason == "stop"  # with an end token, which is no text
        text = self.text.add([] if ends else [token], last=reason is not None)
        text, stopped = self.stops.read(text, last=reason is not None)
        self.reason = "stop" if stopped else reason
        return text


class Text:
    """The text of tokens as they come, in whole characters; its pieces together are the text of all tokens."""

    def __init__(self, decode: Callable[[list[int]], str], before: list[int]):
        self.decode, self.window, self.settled = decode, before, len(before)

    def add(self, tokens: list[int], last: bool) -> str:
        """What these tokens add; "" where a character is not complete, unless they are the last."""
        self.window = self.window + tokens
        whole = self.decode(self.window)
        if whole.endswith(INCOMPLETE) and not last:
            return ""
        new = whole[len(self.decode(self.window[: self.settled])) :]
        if new:  # the next tokens are decoded after those that have just been settled
            self.window = self.window[self.settled :]
            self.settled = len(self.window)
        return new


class Stops:
    """Text up to the stop string that is complete first; what may be the beginning of one is held back."""

    def __init__(self, stops: list[str]):
        self.stops, self.held = stops, ""

    def read(self, text: str, last: bool) -> tuple[str, bool]:
        """What can be given out, and whether a stop string ends it."""
        held = self.held + text
        found = [(at + len(stop), at) for stop in self.stops if (at := held.find(stop)) >= 0]
        if found:
            return held[: min(found)[1]], True
        sizes = range(min(len(held), max(map(len, self.stops), default=0)), 0, -1)
        keep = 0 if last else next((n for n in sizes if any(stop.startswith(held[-n:]) for stop in self.stops)), 0)
        self.held = held[len(held) - keep :]
        return held[: len(held) - keep], False


def _event(body):
    return f"data: {json.dumps(body, separators=(',', ':'))}\n\n"
