"""From token ids to text as it appears: streaming decoding and stop texts."""

from mlx_lm.tokenizer_utils import TokenizerWrapper
from tokenizers.decoders import DecodeStream


class TextStream:
    """The text of one request's tokens; a stop text ends it and is cut off.

    Text that may turn out to be the beginning of a stop text is held back until it is known.
    """

    def __init__(self, tokenizer: TokenizerWrapper, stop: tuple[str, ...]) -> None:
        self.text = ""  # decoded so far, cut at a stop text once one is met
        self._stop = stop
        self._backend = tokenizer.backend_tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)
        self._ids: list[int] = []
        self._shown = 0
        self._stopped = False

    def add(self, token: int) -> bool:
        """Decode one more token. Returns whether a stop text is now complete."""
        self._ids.append(token)
        piece = self._stream.step(self._backend, token)
        if piece:
            self._extend(self.text + piece)
        return self._stopped

    def finish(self) -> None:
        """Decode what waits for more bytes; nothing follows."""
        if not self._stopped:
            whole = self._backend.decode(self._ids, skip_special_tokens=True)
            self._extend(self.text + whole[len(self.text) :])
            self._stop = ()

    def take(self) -> str:
        """Return the text that became certain since the last call."""
        end = len(self.text) if self._stopped else len(self.text) - self._undecided()
        piece = self.text[self._shown : end]
        self._shown = max(end, self._shown)
        return piece

    def _extend(self, text: str) -> None:
        begin = max(len(self.text) - max(map(len, self._stop), default=0), 0)
        found = [at for at in (text.find(stop, begin) for stop in self._stop) if at >= 0]
        self._stopped = bool(found)
        self.text = text[: min(found)] if found else text

    def _undecided(self) -> int:
        """Length of the longest end of the text that begins a stop text."""
        longest = max(map(len, self._stop), default=1) - 1
        ends = range(min(longest, len(self.text)), 0, -1)
        return next((n for n in ends if any(s.startswith(self.text[-n:]) for s in self._stop)), 0)
