"""What a server allows and how long it waits."""

from dataclasses import dataclass

MB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """The limits of one server.

    max_queue: answers that may wait beside the max_batch that run. allow_hosts, allow_origins:
    names in the headers of that name beside the server's own, "*" for any. body_bytes, json_depth:
    of a request's body. body_s: seconds in which it must be there; send_s: in which a reader must
    take something; shutdown_s: given to running answers at the end. connections: at a time.
    """

    host: str = "127.0.0.1"
    max_batch: int = 8
    max_queue: int = 64
    api_key: str | None = None
    allow_hosts: tuple[str, ...] = ()
    allow_origins: tuple[str, ...] = ()
    body_bytes: int = 8 * MB
    json_depth: int = 64
    body_s: float = 30.0
    send_s: float = 120.0
    shutdown_s: float = 30.0
    connections: int = 512

    @property
    def most_answers(self) -> int:
        """Answers that run or wait at a time."""
        return self.max_batch + self.max_queue
