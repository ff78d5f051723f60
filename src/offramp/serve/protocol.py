"""What the HTTP interface takes in, checked: OpenAI's requests for completions and chat, with a few fields of our own.

A field that is not supported is refused if it asks for something, and ignored where it asks for nothing. What is given back
are the types of the package `openai`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from offramp.decode.sampling import Sampling

MOST_LOGPROBS = 20  # alternatives of a token, as OpenAI has it
MOST_CHOICES = 16  # answers to one prompt
MOST_STOPS = 16


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


class Decoding(BaseModel):
    """`offramp`, a field of our own: the fill (`full` is full depth), the number of a calibrated point, and whether the
    answer has the ids of the prompt.
    """

    fill: str | None = None
    point: int | None = None
    ids: bool = False


class Asked(BaseModel):
    """What requests for completions and for chat have in common. Unknown fields are ignored."""

    model: str = ""
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0)
    min_p: float = Field(0.0, ge=0, le=1)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    offramp: Decoding = Field(default_factory=Decoding)
    seed: int | None = None
    n: int = Field(1, ge=1, le=MOST_CHOICES)
    stop: Annotated[list[str], Field(max_length=MOST_STOPS)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] = Field(default_factory=dict)

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
    def longest(self) -> int | None:
        """The longest answer, in tokens, if the request says one."""
        return self.max_tokens

    def sampling(self, number: int) -> Sampling:
        """How answer `number` is drawn. Each answer to one prompt has a seed of its own."""
        return Sampling(
            self.temperature, self.top_k, self.top_p, self.min_p, (self.seed or 0) + number, self.repetition_penalty
        )


class CompletionRequest(Asked):
    """`POST /v1/completions`: `prompt` is a text, or token ids."""

    prompt: str | list[int]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: Literal[False] = False


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


class ChatRequest(Asked):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    response_format: ResponseFormat = Field(default_factory=ResponseFormat)
    tools: Annotated[list[Any], Field(max_length=0)] = Field(default_factory=list)

    @property
    def longest(self) -> int | None:
        """The longest answer, in tokens, if the request says one."""
        return self.max_completion_tokens or self.max_tokens
