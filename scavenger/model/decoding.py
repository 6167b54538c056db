"""Continuous batching: sequences at different positions start and end in a fixed number of rows.

The state of a sequence has constant size, so it fits into one row of the buffers, and every step has the same shapes:
a graph, captured once, serves every token.
"""

import copy
import itertools
import re
from collections import deque
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, library, nn
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .capture import EAGER, Buffers
from .hyena import HyenaMixer, biases_of
from .precision import WideModule
from .token_cpp import Token, knows


SHORT = 32  # tokens: prompts up to this length are read together, longer ones with others of the same power of two

# Products of a linear layer from which on oneDNN is quicker than torch's own: a call of it takes at least 14
# microseconds. Measured on two cores for 1 to 64 rows, 128 to 2,048 channels.
PACKING_PAYS = 1 << 19


class Decoder:
    """Continuous batching for a recurrent student.

        decoder = model.batch_decoder(rows=16)
        first, second = decoder.add([prompt, other])         # row numbers; decoder.logits[first] is for its next token
        logits = decoder.step(decoder.logits.argmax(-1))     # one more token for every row
        decoder.remove([first])                              # its row is free again

    Free rows are computed too, and ignored. The weights are read when the decoder is created: it keeps a copy of those
    that it lays out for its products, so the model itself may go. On a GPU a step is one captured graph; on a CPU the
    mixers' part of it is machine code.

    `state_dtype`: that in which the states of modes are kept between tokens, None: that of the filters (float32). On a
    GPU bfloat16 halves the bytes that a step moves; what it costs is in the recurrence's certificate.json.
    """

    def __init__(self, model: PreTrainedModel, rows: int, state_dtype: torch.dtype | None = None):
        config = model.config
        if config.filter != "modal":
            raise ValueError(f"filter is {config.filter!r}; expected 'modal', with a state of constant size")
        if config.state_grows:
            raise ValueError("attention_window is 0, so the state grows; expected a window")
        if rows < 1:
            raise ValueError(f"rows is {rows}; expected 1 or more")
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise ValueError(f"state_dtype is {state_dtype}; expected one of floating point, as torch.bfloat16")
        self.rows, self.device, self.state_dtype = rows, model.device, state_dtype
        self.model = model
        self.free = list(range(rows))
        with torch.inference_mode(False), torch.no_grad():  # buffers that may be written to in either mode
            self.cache = self._no_tokens()
            self.cache.real = self.cache.real.clone()
            self.logits = torch.zeros(rows, config.vocab_size, dtype=model.lm_head.weight.dtype, device=self.device)
            self.token = Token(model, self.cache) if knows(model, self.cache) else None
        self.model = packed(model, rows, lays_out=self.token is None).eval()
        self.buffers = Buffers(self.cache)
        if self.device.type == "cuda":
            for _ in range(EAGER + 1):  # the last one is captured
                self.step(torch.zeros(rows, dtype=torch.long, device=self.device))
            self.reset()
        # Steps that a GPU is ahead of the host, which then looks for ends while the device computes.
        self.late = 1 if self.device.type == "cuda" else 0

    def add(self, prompts: list[Tensor]) -> list[int]:
        """Read prompts, each (token,), into free rows and return the row numbers; `logits` is for their next tokens."""
        *_, rows = self.adding(prompts)
        return rows

    @torch.no_grad()
    def adding(self, prompts: list[Tensor], tokens: int | None = None) -> Iterator[list[int] | None]:
        """The same in pieces of at most `tokens` tokens: yields None after each, and the row numbers at the end.

        Between two pieces `step` may be called for the other rows. The rows are free again if the iterator is closed.
        """
        if len(prompts) > len(self.free):
            raise ValueError(f"{len(prompts)} prompts for {len(self.free)} free rows of {self.rows}; expected no more")
        for index, prompt in enumerate(prompts):
            if prompt.ndim != 1 or not len(prompt):
                raise ValueError(f"prompt {index} has shape {tuple(prompt.shape)}; expected one axis of tokens")
        rows, self.free = self.free[: len(prompts)], self.free[len(prompts) :]
        shortest_first = sorted(zip(rows, prompts, strict=True), key=lambda pair: len(pair[1]))
        alike = itertools.groupby(shortest_first, lambda pair: (max(len(pair[1]), SHORT) - 1).bit_length())
        groups = [tuple(zip(*pairs, strict=True)) for _, pairs in alike]  # rows and prompts of similar lengths
        found = []
        try:
            for _, own in groups:
                found.append((yield from self._read(own, tokens)))
        except BaseException:
            self.free = [*rows, *self.free]
            raise
        for (own, _), read in zip(groups, found, strict=True):  # not before: a step would read on in their rows
            self._put(own, read)
        yield rows

    def _read(self, prompts, tokens):
        """Read prompts of similar lengths, padded to the longest; yields after every piece, and returns the outputs."""
        longest = max(map(len, prompts))
        ids = torch.zeros(len(prompts), longest, dtype=torch.long, device=self.device)
        mask = torch.zeros_like(ids)
        for own, real, prompt in zip(ids, mask, prompts, strict=True):
            own[longest - len(prompt) :] = prompt.to(self.device)
            real[longest - len(prompt) :] = 1
        piece, cache = longest if tokens is None else max(1, tokens // len(prompts)), None
        for stop in range(piece, longest + piece, piece):
            read = self.model(
                input_ids=ids[:, stop - piece : stop],
                attention_mask=mask[:, :stop],
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = read.cache
            yield
        return read

    def _put(self, rows, read):
        """Copy the states after prompts into these rows."""
        places = torch.tensor(rows, device=self.device)
        self.cache.real.index_copy_(0, places, read.cache.real)
        for mine, new in zip(self.cache.layers, read.cache.layers, strict=True):
            for ring, own in zip(mine.rings, new.rings, strict=True):
                own.turn_to(ring.written)  # the newest token has the same place in all rows
            for buffer, state in zip(mine.states, new.states, strict=True):
                buffer.index_copy_(0, places, state.to(buffer.dtype))
        self.logits = self.logits.index_copy(0, places, read.logits[:, 0].to(self.logits.dtype))

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:  # (row,) -> (row, vocabulary)
        """Read one token in every row and return the logits of the next, without waiting for the device."""
        if tokens.shape != (self.rows,):
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; expected ({self.rows},), one for each row")
        self.logits = self._advance(tokens.to(self.device)[:, None])
        return self.logits

    def remove(self, rows: list[int]):
        """Free these rows."""
        for row in rows:
            if row in self.free or not 0 <= row < self.rows:
                raise ValueError(f"row {row} holds no sequence; expected one that add returned")
            self.free.append(row)

    @torch.no_grad()
    def reset(self):
        """Free all rows and put back their buffers.

        After an exception in `step` this is necessary: it may have advanced some layers only.
        """
        self.buffers.take(self._no_tokens())
        self.free = list(range(self.rows))

    def generate(
        self,
        prompts: list[Tensor],
        max_new_tokens: int,
        eos_token_id: int | list[int] | None | Literal["own"] = "own",
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> list[Tensor]:
        """The new tokens of each prompt; a finished sequence's row takes the next prompt.

        A sequence ends with any of `eos_token_id`, which it includes: "own" stands for the model's generation
        configuration, None for no end but `max_new_tokens`. After an exception all rows are free.
        """
        if len(self.free) < self.rows:
            raise ValueError(f"{self.rows - len(self.free)} rows hold sequences; expected all to be free")
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {max_new_tokens}; expected 1 or more")
        warpers = LogitsProcessorList([TemperatureLogitsWarper(float(temperature))])
        if top_k is not None:
            warpers.append(TopKLogitsWarper(top_k))
        if top_p is not None:
            warpers.append(TopPLogitsWarper(top_p))
        if isinstance(eos_token_id, str):
            if eos_token_id != "own":
                raise ValueError(f"eos_token_id is {eos_token_id!r}; expected 'own', None, a token or several")
            eos_token_id = self.model.generation_config.eos_token_id
        ends = set(torch.as_tensor([] if eos_token_id is None else eos_token_id).flatten().tolist())
        try:
            return self._generate(prompts, max_new_tokens, ends, warpers if do_sample else None)
        except BaseException:
            self.reset()
            raise

    def _generate(self, prompts, max_new_tokens, ends, warpers):
        waiting, running, found = deque(enumerate(prompts)), {}, [[] for _ in prompts]
        unread = deque()  # tokens that were chosen, and the sequences in their rows
        while waiting or running:
            new = [waiting.popleft() for _ in range(min(len(self.free), len(waiting)))]
            running |= zip(self.add([prompt for _, prompt in new]), [index for index, _ in new], strict=True)
            if warpers is not None:
                tokens = torch.multinomial(warpers(None, self.logits.float()).softmax(-1), 1)[:, 0]
            else:
                tokens = self.logits.argmax(-1)
            unread.append((Arriving(tokens), dict(running)))
            if self.late:
                self.step(tokens)
            while len(unread) > self.late:
                arriving, sequences = unread.popleft()
                chosen = arriving.tolist()
                for row, index in sequences.items():
                    if running.get(row) != index:  # it ended one token before
                        continue
                    found[index].append(chosen[row])
                    if len(found[index]) == max_new_tokens or chosen[row] in ends:
                        del running[row]
                        self.remove([row])
            if running and not self.late:
                self.step(tokens)
        return [torch.tensor(tokens) for tokens in found]

    def _no_tokens(self):
        """A cache of all rows that has read nothing."""
        nothing = torch.zeros(self.rows, 0, dtype=torch.long, device=self.device)
        cache = self.model(input_ids=nothing, use_cache=True).cache
        if self.state_dtype is not None:
            for modes in (modes for layer in cache.layers for modes in getattr(layer, "modal_states", ())):
                modes.state = modes.state.to(self.state_dtype)
        return cache

    def _advance(self, ids):
        if self.token is not None:
            return self.token(ids)[:, 0]
        logits = self.model(input_ids=ids, cache=self.cache).logits[:, 0]
        self.buffers.keep()
        return logits


class Arriving:
    """A tensor on its way to the host, behind which the device may go on."""

    def __init__(self, x: Tensor):
        self.held, self.event = x, None
        if x.is_cuda:
            self.held = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
            self.held.copy_(x, non_blocking=True)
            self.event = torch.cuda.Event()
            self.event.record()

    def tolist(self) -> list:
        if self.event is not None:
            self.event.synchronize()
        return self.held.tolist()


def packed(model: nn.Module, rows: int, lays_out: bool = True) -> nn.Module:
    """A copy of the model for decoding: it shares all parameters, but for products that are laid out for steps.

    The projections of a mixer become one product; on a CPU large products in float32 are packed for oneDNN.
    """
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    model = copy.deepcopy(model, shared)
    if not lays_out:
        return model
    packs = model.device.type == "cpu" and torch.backends.mkldnn.is_available()
    for parent in list(model.modules()):
        if isinstance(parent, WideModule):
            continue
        if isinstance(parent, HyenaMixer) and all(type(part) is nn.Linear for part in parent.projections):
            parent.projected_at_once = _at_once(parent.projections)
        unused = parent.projections if getattr(parent, "projected_at_once", None) is not None else []
        for name, child in parent.named_children():
            if type(child) is not nn.Linear or child in unused:
                continue
            if packs and child.weight.dtype == torch.float32 and rows * child.weight.numel() >= PACKING_PAYS:
                setattr(parent, name, PackedLinear(child, rows))
    return model


@torch.no_grad()
def _at_once(projections):
    weight, biases = torch.cat([projection.weight for projection in projections]), biases_of(projections)
    made = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    if biases:
        made.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
    return made


class PackedLinear(nn.Module):
    """A linear layer with its weight in the layout of oneDNN's matrix product, for inference on a CPU in float32.

    64 rows of 512 channels and an output of 50,304: 34 ms, nn.Linear 78 ms, measured on one core of a busy machine.
    """

    def __init__(self, linear: nn.Linear, rows: int):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight.detach().to("meta"), linear.bias  # the weight: its shape
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), rows)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            return packed_linear(x, self.packed, self.bias)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


# An opaque operator for torch.compile, which accepts packed weights only if it packed them itself. Named after the
# module, as this file can be loaded twice, from the package and from a checkpoint.
@library.custom_op(re.sub(r"\W", "_", __name__) + "::packed_linear", mutates_args=())
def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@packed_linear.register_fake
def _(x, packed, bias):
    return x.new_empty(*x.shape[:-1], packed.shape[0])
