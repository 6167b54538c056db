"""The thread that owns the model: sequences wait for a free row of the Decoder, and leave it when they end."""

import asyncio
import logging
import random
import threading
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from scavenger.model.decoding import Decoder


log = logging.getLogger(__package__)


class QueueFull(Exception):
    """No place among the running and waiting sequences."""


class Failed(Exception):
    """The sequence cannot be continued; `usable` says whether the model can still serve others."""

    def __init__(self, reason: str, usable: bool):
        super().__init__(reason)
        self.usable = usable


@dataclass(eq=False)
class Sequence:
    """A prompt to continue by at most `max_tokens` tokens, each drawn with a number of `numbers`; greedily at 0.

    `deliver(token, reason)` is called in the event loop with each token, and with reason "stop" or "length" beside the
    last one; `deliver(Failed, None)` ends a sequence that failed.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float
    top_p: float
    numbers: random.Random
    deliver: Callable[[int | Failed, str | None], None]
    length: int = field(default=0, init=False)  # tokens generated
    cancelled: bool = field(default=False, init=False)


class Worker:
    """Continuous batching of sequences that other threads submit and cancel.

    `places`: sequences that run or wait at most. `prompt_tokens`: no more tokens of prompts are read between two steps,
    so that the running sequences never wait longer than for so many.
    """

    def __init__(self, decoder: Decoder, ends: set[int], places: int, prompt_tokens: int):
        self.decoder, self.ends, self.places, self.prompt_tokens = decoder, ends, places, prompt_tokens
        self.running: dict[int, Sequence] = {}  # by row
        self.entering: list[Sequence] = []  # their prompts are being read
        self.reading: Iterator[list[int] | None] | None = None  # the prompts of `entering`
        self.waiting: deque[Sequence] = deque()
        self.usable = True
        self.closed = False
        self.changed = threading.Condition()  # guards `entering`, `waiting` and `closed`
        self.thread = threading.Thread(target=self._work, name="model", daemon=True)

    def start(self, loop: asyncio.AbstractEventLoop):
        self.loop = loop
        self.thread.start()

    def submit(self, sequences: list[Sequence]):
        """Let sequences wait for a row, all or none of them; raises QueueFull, and Failed once the worker has ended."""
        with self.changed:
            if self.closed:
                raise Failed("the server is stopping" if self.usable else "the model has failed", self.usable)
            held = len(self.running) + len(self.entering) + len(self.waiting)
            if held + len(sequences) > self.places:
                raise QueueFull
            self.waiting.extend(sequences)
            self.changed.notify()

    def cancel(self, sequences: list[Sequence]):
        """End sequences that nobody reads any more: a row is free at the next step."""
        with self.changed:
            for sequence in sequences:
                sequence.cancelled = True
                if sequence in self.waiting:
                    self.waiting.remove(sequence)

    def close(self):
        """End the thread after the step it is in; sequences that run or wait fail."""
        with self.changed:
            self.closed = True
            self.changed.notify()
        self.thread.join()

    def _work(self):
        reason = "the server is stopping"
        try:
            while self._some_to_do():
                self._turn()
        except Exception:
            log.exception("the model cannot be used any more")
            self.usable, reason = False, "the model has failed"
        with self.changed:
            self.closed = True
            left = [*self.running.values(), *self.entering, *self.waiting]
            self.running, self.entering, self.waiting = {}, [], deque()
        self._fail(left, Failed(reason, self.usable))

    def _some_to_do(self):
        with self.changed:
            self.changed.wait_for(lambda: self.closed or self.running or self.entering or self.waiting)
            return not self.closed

    def _turn(self):
        """Free and fill rows, and generate one token in each."""
        self._leave([row for row, sequence in self.running.items() if sequence.cancelled])
        self._enter()
        try:
            self._step()
        except Exception as error:
            log.exception("a step failed")
            failed, self.running = list(self.running.values()), {}
            self._fail(failed, _failure(error))
            if self.reading:  # its sequences lose nothing but time
                self.reading.close()
                with self.changed:
                    self.waiting.extendleft(reversed(self.entering))
                    self.reading, self.entering = None, []
            self.decoder.reset()

    def _enter(self):
        """Read a piece of the prompts of waiting sequences, and let those run that are read to the end."""
        with self.changed:
            while not self.reading and self.waiting and len(self.entering) < len(self.decoder.free):
                tokens = sum(len(sequence.prompt) for sequence in [*self.entering, self.waiting[0]])
                if self.entering and tokens > self.prompt_tokens:
                    break
                self.entering.append(self.waiting.popleft())
        if not self.entering:
            return
        if not self.reading:
            prompts = [torch.tensor(sequence.prompt) for sequence in self.entering]
            self.reading = self.decoder.adding(prompts, self.prompt_tokens)
        new, rows = self.entering, []
        try:
            rows = next(self.reading)
        except Exception as error:  # the rows of the others are as they were
            log.exception("a prompt could not be read")
            self._fail(new, _failure(error))
        if rows is None:
            return
        with self.changed:
            self.running |= zip(rows, new, strict=False)  # none where reading failed
            self.reading, self.entering = None, []
        if not self.running:
            self.decoder.reset()  # raises if the model can compute nothing any more

    def _step(self):
        """Choose a token in each row, hand it over, and read it where the sequence goes on."""
        if not self.running:
            return
        logits = self.decoder.logits
        highest, tokens = logits.max(-1)
        drawing = {row: sequence for row, sequence in self.running.items() if sequence.temperature > 0}
        if drawing:
            asked = [(each.temperature, each.top_p, each.numbers.random()) for each in drawing.values()]
            rows = torch.tensor(list(drawing), device=logits.device)
            wanted = torch.tensor(asked, dtype=torch.float64, device=logits.device).T
            tokens[rows] = drawn(logits[rows], *wanted)
        chosen, finite, events, ended = tokens.tolist(), highest.isfinite().tolist(), [], []
        for row, sequence in self.running.items():
            sequence.length += 1
            event, reason = chosen[row], None
            if not finite[row]:
                event = Failed("the model's logits are not finite", True)
            elif event in self.ends:
                reason = "stop"
            elif sequence.length == sequence.max_tokens:
                reason = "length"
            if reason or not finite[row]:
                ended.append(row)
            events.append((sequence, event, reason))
        self._leave(ended)
        self._deliver(events)
        if self.running:
            self.decoder.step(tokens)

    def _leave(self, rows):
        self.decoder.remove(rows)
        for row in rows:
            del self.running[row]

    def _fail(self, sequences, failure):
        self._deliver([(sequence, failure, None) for sequence in sequences])

    def _deliver(self, events):
        """One call of the event loop for a whole step."""
        self.loop.call_soon_threadsafe(_hand_over, events)


def _hand_over(events):
    for sequence, event, reason in events:
        sequence.deliver(event, reason)


def _failure(error):
    return Failed(f"the model failed ({type(error).__name__})", True)


def drawn(logits: Tensor, temperature: Tensor, top_p: Tensor, number: Tensor) -> Tensor:
    """A token for each row, from the fewest most likely tokens that have a probability of `top_p` together.

    The token is the first whose cumulative probability, in the order of the vocabulary, exceeds `number` in [0, 1) of
    the total: the same number gives the same token whatever the other rows are. logits: (row, vocabulary), all else
    (row,) in float64, temperature above 0.
    """
    logits = logits.double()
    # The largest is subtracted first, so that no temperature makes it infinite.
    weights = ((logits - logits.amax(-1, keepdim=True)) / temperature[:, None]).softmax(-1)
    narrow = (top_p < 1).nonzero()[:, 0]
    if len(narrow):
        sorted, order = weights[narrow].sort(dim=-1, descending=True, stable=True)
        sorted[:, 1:] *= sorted.cumsum(-1)[:, :-1] < top_p[narrow, None]  # the most likely one always stays
        weights[narrow] = torch.zeros_like(sorted).scatter(-1, order, sorted)
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    # Rounding may make the product the total itself, which no token exceeds.
    place = torch.minimum(number * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, place[:, None], right=True)[:, 0]
