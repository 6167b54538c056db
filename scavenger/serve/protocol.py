"""OpenAI's protocol: which bodies are understood, the forms of their answers, and of errors."""

import reprlib
from typing import Annotated, ClassVar, Literal

from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


RETRY_SECONDS = 1  # rows become free all the time


class Refused(Exception):
    """A request that is answered with an error in OpenAI's format; `retry`: the same request may succeed later."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None, retry=False):
        super().__init__(message)
        self.status, self.retry = status, retry
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, {"Retry-After": str(RETRY_SECONDS)} if self.retry else None)


def invalid(error: RequestValidationError) -> Refused:
    """The first thing that is wrong with a body, in one line."""
    first = error.errors()[0]
    _, *place = first["loc"]
    if first["type"] == "json_invalid":
        return Refused(400, f"body: found malformed JSON ({first['ctx']['error']}); expected a JSON object")
    if not place:
        return Refused(400, "body: found none; expected a JSON object, with Content-Type: application/json")
    name, fields = place[0], ChatCompletion.model_fields | Completion.model_fields
    if first["type"] == "extra_forbidden" and len(place) == 1:
        return Refused(400, f"{name}: found a parameter that is not supported; expected none", name)
    found = reprlib.repr(error.body[name]) if name in error.body else "none"
    return Refused(400, f"{name}: found {found}; expected {fields[name].description}", name)


def expected(description: str, default=None, **bounds):
    """A parameter, and what an error says was expected."""
    return Field(default, description=description, **bounds)


class Strict(BaseModel):
    """No parameter is passed over, and none is converted."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _encodable(text):
    text.encode()  # JSON can name half a surrogate pair, which no tokenizer takes; the error is a ValueError
    return text


Str = Annotated[str, AfterValidator(_encodable)]


class Part(Strict):
    """A piece of a message's content."""

    type: Literal["text"]
    text: Str


class Message(Strict):
    """A message of a conversation."""

    role: Str
    content: Str | list[Part]

    def plain(self) -> dict:
        """As chat templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": text}


class StreamOptions(Strict):
    """What a stream also tells."""

    include_usage: bool = False


Stop = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Tokens = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]
NOTHING = {"ge": 0, "le": 0}  # the one value that asks for nothing


class Ask(Strict):
    """What both endpoints understand; None stands for what OpenAI's API does without the parameter."""

    model: str = expected("the model's name, as /v1/models has it", ...)
    max_tokens: int | None = expected("a number of tokens from 1 on", ge=1)
    temperature: float | None = expected("a number from 0 (always the most likely token) to 2", ge=0, le=2)
    top_p: float | None = expected("a probability from 0 to 1", ge=0, le=1)
    n: int | None = expected("a number of choices from 1 to 128", ge=1, le=128)
    stop: Stop | Annotated[list[Stop], Field(max_length=4)] | None = expected("up to four texts of 1 to 256 characters")
    seed: int | None = expected("an integer")
    stream: bool | None = expected("true or false")
    stream_options: StreamOptions | None = expected("{include_usage: true or false}")
    user: str | None = expected("a text, which changes nothing")
    presence_penalty: float | None = expected("0, as penalties are not supported", **NOTHING)
    frequency_penalty: float | None = expected("0, as penalties are not supported", **NOTHING)
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = expected("none, as it is not supported")

    @property
    def stops(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class Completion(Ask):
    """The body of /v1/completions, and the forms of its answer."""

    prompt: Str | Annotated[list[Str], Field(min_length=1)] | Tokens | Annotated[list[Tokens], Field(min_length=1)] = (
        expected("a text, a list of texts, or tokens: a list, not empty, of numbers from 0 on, or several", ...)
    )
    echo: bool | None = expected("true or false")
    best_of: int | None = expected("1, as more is not supported", ge=1, le=1)
    suffix: None = expected("none, as it is not supported")
    logprobs: None = expected("none, as they are not supported")

    subject: ClassVar[str] = "prompt"
    default_tokens: ClassVar[int | None] = 16  # OpenAI's
    prefix: ClassVar[str] = "cmpl-"
    kind: ClassVar[str] = "text_completion"
    chunk_kind: ClassVar[str] = "text_completion"

    @property
    def new_tokens(self) -> int | None:
        return self.max_tokens

    def choice(self, text: str) -> dict:
        return {"text": text, "logprobs": None}

    def piece(self, text: str) -> dict:
        return {"text": text, "logprobs": None}

    def opening(self, echo: str) -> dict | None:
        """What a stream says of a choice before its tokens."""
        return self.piece(echo) if echo else None


class ChatCompletion(Ask):
    """The body of /v1/chat/completions, and the forms of its answer."""

    messages: Annotated[list[Message], Field(min_length=1)] = expected(
        "a list of messages {role, content}, each content a text or parts {type: text, text}", ...
    )
    max_completion_tokens: int | None = expected("a number of tokens from 1 on", ge=1)
    logprobs: Literal[False] | None = expected("false, as they are not supported")
    top_logprobs: None = expected("none, as they are not supported")

    subject: ClassVar[str] = "messages"
    default_tokens: ClassVar[int | None] = None  # as many as there is room for
    prefix: ClassVar[str] = "chatcmpl-"
    kind: ClassVar[str] = "chat.completion"
    chunk_kind: ClassVar[str] = "chat.completion.chunk"

    @property
    def new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def choice(self, text: str) -> dict:
        return {"message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}

    def piece(self, text: str) -> dict:
        return {"delta": {"content": text} if text else {}, "logprobs": None}

    def opening(self, echo: str) -> dict | None:
        """What a stream says of a choice before its tokens."""
        return {"delta": {"role": "assistant", "content": ""}, "logprobs": None}
