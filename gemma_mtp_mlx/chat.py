"""A chat: a conversation and the session that answers in it. Nothing here knows of a terminal."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

from gemma_mtp_mlx.cache import seat_size
from gemma_mtp_mlx.conversation import Conversation, Turn
from gemma_mtp_mlx.request import Request, Stats
from gemma_mtp_mlx.sampling import SamplingParams
from gemma_mtp_mlx.sections import Piece
from gemma_mtp_mlx.session import Session

End = Literal["stop", "max_tokens", "context", "stopped"]
_NEWS = Piece("text", "")


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that is over. end: "stop" is the model's own, "stopped" that of whoever asked.

    kept: whether it is part of the conversation; one stopped before it had any text is not.
    used: tokens of the context that question and answer and all before them take.
    """

    turn: Turn
    end: End
    kept: bool
    stats: Stats
    used: int


class Chat:
    """One conversation. Its prompts begin alike, so each takes over what the last one computed.

    session: runs nothing else. params: of every answer. template: whether questions go through the
    chat template; without, the conversation is a text that the model continues. context: tokens
    that a question, all before it and its answer may have.
    """

    def __init__(
        self, session: Session, params: SamplingParams, conversation: Conversation, template: bool
    ) -> None:
        self.params = params
        self.template = template
        self.context = min(
            session.engine.models.target.config.max_position_embeddings,
            session.engine.seating.positions - seat_size(0),
        )
        self.begin(conversation)
        self._session = session
        self._running: Request | None = None
        self._stopping = False

    def begin(self, conversation: Conversation) -> None:
        """Go on with this conversation; what was counted of another one is forgotten."""
        self.conversation = conversation
        self.answers: list[Answer] = []

    @property
    def running(self) -> Stats | None:
        """What the answer that is being generated has cost so far."""
        return None if self._running is None else self._running.stats

    def ask(self, question: str) -> Iterator[Piece]:
        """Yield the answer as it is generated; afterwards it is the last of `answers`.

        A piece without text says that the prompt has come further. `stop` ends the answer: what is
        there of it stays.
        Raises: ValueError for what cannot be asked or fails; the conversation is as before then.
        """
        self._stopping = False
        ids = self._encode(question)
        room = self.context - len(ids)
        if room < 1:
            raise ValueError(
                f"with this question the conversation has {len(ids)} tokens and the context is "
                f"{self.context}; /save FILE keeps it, /reset begins a new one"
            )
        params = replace(self.params, max_tokens=min(self.params.max_tokens, room))
        request = self._session.prompts.request(ids, params, sections=True)
        self._session.enqueue(request)
        self._running = request
        pieces: list[Piece] = []
        try:
            for piece in self._stream(request):
                pieces.append(piece)
                yield piece
        finally:
            self._running = None
            self._session.cancel(request)  # no more than a word if it is over
        if request.error is not None:
            raise ValueError(f"the answer failed: {request.error}") from request.error
        self._add(question, pieces, request)

    def stop(self) -> None:
        """End the answer that is being generated; a signal's handler may call it."""
        self._stopping = True

    def _stream(self, request: Request) -> Iterator[Piece]:
        over = False
        while not over:
            if self._stopping:
                self._session.cancel(request)
            mine = [chunk for chunk in self._session.step() if chunk.request is request]
            over = any(chunk.result is not None for chunk in mine)
            yield from [piece for chunk in mine for piece in chunk.pieces] or [_NEWS]

    def _encode(self, question: str) -> list[int]:
        prompts = self._session.prompts
        if not self.template:
            return prompts.encode(self.conversation.text(question), template=False)
        return prompts.encode(self.conversation.messages(question), thinking=self.params.thinking)

    def _add(self, question: str, pieces: list[Piece], request: Request) -> None:
        """Take an answer into the conversation."""
        stopped = request.finish_reason == "cancelled"
        text = "".join(piece.text for piece in pieces if piece.kind != "reasoning")
        reasoning = "".join(piece.text for piece in pieces if piece.kind == "reasoning")
        turn = Turn(question, text, reasoning, stopped)
        kept = bool(text) or not stopped
        if kept:
            self.conversation.turns.append(turn)
        end: End = "stopped" if stopped else "stop"
        if request.finish_reason == "length":
            full = request.params.max_tokens < self.params.max_tokens
            end = "context" if full else "max_tokens"
        used = len(request.prompt) + len(request.tokens)
        self.answers.append(Answer(turn, end, kept, request.stats, used))
