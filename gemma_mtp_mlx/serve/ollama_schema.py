"""What Ollama's clients may send, field by field.

Fields that are not here are passed over, as Ollama does. Of options that have no effect the reply
says so, in ignored_options.
"""

import re
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

from gemma_mtp_mlx.serve.openai_schema import Name, Stop, Tool

# About memory and devices, which are this server's own matter and change no token. Of num_ctx: a
# request may use the model's whole context, as far as the memory for keys and values goes; one that
# does not fit is refused, nothing is cut off its front.
PLACEMENT = frozenset(
    {
        *("num_ctx", "num_keep", "num_batch", "num_gpu", "main_gpu", "num_thread", "numa"),
        *("use_mmap", "use_mlock", "low_vram", "f16_kv", "logits_all", "vocab_only"),
        "embedding_only",
    }
)
_DURATION = re.compile(r"[-+]?(0|((\d+(\.\d*)?|\.\d+)(ns|us|µs|μs|ms|s|m|h))+)")


def _no_images(images: list[Any] | None) -> None:
    if images:
        raise ValueError("this server reads text only; leave images out")


def _duration(value: float | str | None) -> float | str | None:
    if isinstance(value, str) and not _DURATION.fullmatch(value):
        raise ValueError('a duration is a number of seconds, or a text such as "5m" or "1h30m"')
    return value


def _lower(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


Images = Annotated[list[Any] | None, AfterValidator(_no_images)]
Role = Annotated[Literal["system", "user", "assistant", "tool"], BeforeValidator(_lower)]


class Options(BaseModel):
    """How to generate. What is left out: the model's own, and where it has none Ollama's."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    num_predict: int | None = None
    temperature: float | None = Field(None, ge=0, le=100)
    top_k: int | None = None
    top_p: float | None = Field(None, gt=0)
    min_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = None
    stop: Stop | None = None
    repeat_penalty: float | None = Field(None, gt=0, le=10)
    repeat_last_n: int | None = Field(None, ge=-1)
    presence_penalty: float | None = Field(None, ge=-100, le=100)
    frequency_penalty: float | None = Field(None, ge=-100, le=100)
    draft_num_predict: int | None = Field(None, ge=0)

    @property
    def ignored(self) -> list[str]:
        """Names of what was sent and has no effect on the text, though it might have elsewhere."""
        sent = (self.model_extra or {}).items()
        return sorted(name for name, value in sent if value is not None and name not in PLACEMENT)


class FunctionCall(BaseModel):
    """A call as the model made it."""

    name: Name
    arguments: dict[str, Any] = Field(default_factory=dict)


class ToolCall(BaseModel):
    """A tool call in a message of the assistant."""

    id: str | None = None
    function: FunctionCall


class Message(BaseModel):
    """A message of a conversation."""

    role: Role
    content: str | None = None
    thinking: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_name: str | None = None
    tool_call_id: str | None = None
    images: Images = None


class Common(BaseModel):
    """What both endpoints that generate take. The model stays loaded whatever keep_alive says."""

    model_config = ConfigDict(allow_inf_nan=False)

    model: str = Field(min_length=1)
    stream: bool | None = None
    format: Literal["", "json"] | dict[str, Any] | None = None
    options: Options | None = None
    think: bool | Literal["low", "medium", "high", "max"] | None = None
    keep_alive: Annotated[float | str | None, AfterValidator(_duration)] = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @property
    def settings(self) -> Options:
        """The options, none of them set if there are none."""
        return self.options or Options.model_validate({})


class ChatRequest(Common):
    """The body of /api/chat. Without messages nothing is generated."""

    messages: list[Message] | None = None
    tools: list[Tool] | None = None


class GenerateRequest(Common):
    """The body of /api/generate. Without a prompt nothing is generated."""

    prompt: str | None = None
    suffix: str | None = None
    system: str | None = None
    template: str | None = None
    context: list[int] | None = None
    raw: bool | None = None
    images: Images = None


class PullRequest(BaseModel):
    """The body of /api/pull."""

    model: str | None = None
    name: str | None = None  # what older clients call it
    stream: bool | None = None


class ShowRequest(BaseModel):
    """The body of /api/show."""

    model: str | None = None
    name: str | None = None
