"""The requests of the HTTP interface, checked: OpenAI's for completions and chat, with a few fields of our own.

Some of OpenAI's fields are not supported. Those that would change an answer are refused, unless they ask for nothing; the
others have no effect. docs/serve.md lists all of them. Answers have the types of the package `openai`.
"""

from __future__ import annotations

import json
import secrets
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from offramp.decode.sampling import Sampling

MOST_LOGPROBS = 20  # alternatives of a token, as OpenAI has it
MOST_STOPS = 16
MOST_STOP = 256  # characters of a stop text
MOST_MESSAGES = 1024
LARGEST = 2**63 - 1  # of a whole number
LEAST_TEMPERATURE = 0.01  # above 0, as vLLM has it: logits that are divided by less may leave the range of float32


def _refused(*nothing: Any) -> AfterValidator:
    """The check of a field that is not supported: `nothing` are the values that ask for nothing."""

    def check(value: Any) -> Any:
        if value not in nothing:
            raise PydanticCustomError("unsupported", "This is not supported here. Leave it out.")
        return value

    return AfterValidator(check)


Stop = Annotated[str, Field(max_length=MOST_STOP)]


class StreamOptions(BaseModel):
    """`stream_options`: whether the last chunk of a stream has the usage."""

    include_usage: bool = False


class JsonSchema(BaseModel):
    """`response_format.json_schema`: the schema that an answer must fit."""

    model_config = ConfigDict(populate_by_name=True)

    name: str = "answer"
    schema_: dict[str, Any] = Field(default_factory=dict, alias="schema")


class ResponseFormat(BaseModel):
    """`response_format`: text, any JSON object, or JSON that fits a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _is_whole(self) -> ResponseFormat:
        if self.type == "json_schema" and not self.json_schema:
            raise PydanticCustomError("missing", "Give json_schema the schema.")
        return self

    @property
    def schema_of_answers(self) -> dict[str, Any] | None:
        """The JSON schema that answers must fit, if any."""
        given = self.json_schema.schema_ if self.json_schema else {}
        return {"text": None, "json_object": {"type": "object"}, "json_schema": given}[self.type]


class Decoding(BaseModel):
    """`offramp`, a field of our own: the mode, and whether the answer has the ids of the prompt. Unknown fields in it are
    refused: they would be asked for and not done.
    """

    model_config = ConfigDict(extra="forbid")

    mode: str | None = None
    ids: bool = False


class AnswerRequest(BaseModel):
    """The common fields of requests for completions and for chat. Unknown fields are ignored.

    A request without a seed gets a new one.
    """

    model: str = ""
    max_tokens: int | None = Field(None, ge=1, le=LARGEST)
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, le=LARGEST)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, ge=0.01, le=100)
    offramp: Decoding = Field(default_factory=Decoding)
    seed: int = Field(default_factory=lambda: secrets.randbits(63), ge=-LARGEST - 1, le=LARGEST)
    n: int = Field(1, ge=1, le=LARGEST)
    stop: Annotated[list[Stop], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    frequency_penalty: Annotated[Any, _refused(0)] = 0
    presence_penalty: Annotated[Any, _refused(0)] = 0
    logit_bias: Annotated[Any, _refused({})] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, values: Any) -> Any:
        """Refuse half a surrogate pair, anywhere: JSON can write it, and UTF-8 cannot."""
        if isinstance(values, dict):
            try:
                json.dumps(values, ensure_ascii=False).encode()
            except (UnicodeEncodeError, RecursionError):
                raise PydanticCustomError("no_text", "A text has half a surrogate pair, or lists are too deep.") from None
        return values

    @field_validator("stop", mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        return [] if value is None else [value] if isinstance(value, str) else value

    @field_validator("*", mode="before")
    @classmethod
    def _default(cls, value: Any, info: Any) -> Any:
        """null asks for the default."""
        field = cls.model_fields[info.field_name]
        return field.get_default(call_default_factory=True) if value is None else value

    @property
    def characters(self) -> int:
        """The characters of the prompt."""
        return 0

    @property
    def longest(self) -> int | None:
        """The longest answer, in tokens, if the request says one."""
        return self.max_tokens

    def sampling(self, number: int) -> Sampling:
        """The sampling of answer `number`. Each answer to one prompt has a seed of its own."""
        temperature = max(self.temperature, LEAST_TEMPERATURE) if self.temperature else 0.0
        return Sampling(temperature, self.top_k, self.top_p, self.min_p, self.seed + number, self.repetition_penalty)


class CompletionRequest(AnswerRequest):
    """`POST /v1/completions`: `prompt` is a text, or token ids."""

    prompt: str | Annotated[list[int], Field(fail_fast=True)]  # of a long list that is none, one error says enough
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Annotated[Any, _refused(False)] = False
    best_of: Annotated[Any, _refused(1)] = 1
    suffix: Annotated[Any, _refused("")] = ""

    @property
    def characters(self) -> int:
        """The characters of the prompt; it may have none, but ids."""
        return len(self.prompt) if isinstance(self.prompt, str) else 0


class Message(BaseModel):
    """One message of a conversation. Its content is a text, or parts of type text."""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str = ""

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any) -> Any:
        if isinstance(value, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in value):
            return "".join(str(part.get("text", "")) for part in value)
        return "" if value is None else value


class ChatRequest(AnswerRequest):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=MOST_MESSAGES)]
    max_completion_tokens: int | None = Field(None, ge=1, le=LARGEST)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)
    tools: Annotated[Any, _refused([])] = Field(default_factory=list)
    tool_choice: Annotated[Any, _refused("none", "auto")] = "none"
    functions: Annotated[Any, _refused([])] = Field(default_factory=list)
    function_call: Annotated[Any, _refused("none", "auto")] = "none"
    modalities: Annotated[Any, _refused(["text"], [])] = Field(default_factory=list)
    audio: Annotated[Any, _refused(None)] = None
    moderation: Annotated[Any, _refused(None)] = None
    reasoning_effort: Annotated[Any, _refused("none")] = "none"
    verbosity: Annotated[Any, _refused("medium")] = "medium"
    web_search_options: Annotated[Any, _refused(None)] = None

    @model_validator(mode="after")
    def _asks_for_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise PydanticCustomError("missing", "top_logprobs needs logprobs.")
        return self

    @property
    def characters(self) -> int:
        """The characters of all messages."""
        return sum(len(message.content) for message in self.messages)

    @property
    def longest(self) -> int | None:
        """The longest answer, in tokens, if the request says one."""
        return self.max_completion_tokens or self.max_tokens
