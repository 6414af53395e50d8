"""What an operator decides about the server, besides the engine's own options."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from kvbits.errors import ConfigError
from kvbits.server.keys import ApiKey, Client, Keyring

_HOST = re.compile(r"(\*\.)?[^\s:/*@\[\]]+|[0-9A-Fa-f:.]*::?[0-9A-Fa-f:.%a-z]*")

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/?#*]+")


@dataclass(frozen=True)
class ServerOptions:
    """Options of the HTTP side.

    ``max_queue`` counts sequences that wait beyond the engine's ``max_num_seqs``; ``request_timeout`` and
    ``drain_timeout`` are in seconds, ``max_body`` in bytes. ``header_timeout`` and ``body_timeout`` are the seconds
    that a client has to send either, ``send_timeout`` those for which it may leave an answer unread.
    No ``api_keys`` (texts are keys without a name): everybody may ask. ``allow_priority``: requests may set it without
    a key that permits it. ``share_prefix_cache``: clients of different keys find each other's pages, and so can tell
    whether another one had a prompt. ``allowed_hosts``: names that the server answers to besides ``localhost`` and
    addresses, as :class:`kvbits.server.hosts.Hosts` takes them. Raises ``ConfigError`` for a value that cannot work.
    """

    served_model_name: str
    api_keys: tuple[ApiKey | str, ...] = field(default=(), repr=False)
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    max_queue: int = 256
    request_timeout: float | None = None
    drain_timeout: float = 30.0
    max_body: int = 8 << 20
    header_timeout: float = 15.0
    body_timeout: float = 30.0
    send_timeout: float = 60.0
    allow_priority: bool = False
    share_prefix_cache: bool = False
    keyring: Keyring = field(init=False, repr=False)

    def __post_init__(self) -> None:
        for name in ("max_queue", "max_body"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be at least 1")
        for name in ("request_timeout", "header_timeout", "body_timeout", "send_timeout"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ConfigError(f"{name} is {value}; it must be a positive number of seconds")
        if not self.drain_timeout >= 0:
            raise ConfigError(f"drain_timeout is {self.drain_timeout}; it must be a number of seconds, 0 or more")
        for origin in self.allowed_origins:
            if origin != "*" and not _ORIGIN.fullmatch(origin):
                raise ConfigError(f"allowed_origins holds '{origin}'; it takes origins as http://host:port, or '*'")
        for name in self.allowed_hosts:
            if name != "*" and not _HOST.fullmatch(name):
                raise ConfigError(
                    f"allowed_hosts holds '{name}'; it takes names without scheme and port, '*.example.org', or '*'"
                )
        if not self.served_model_name:
            raise ConfigError("served_model_name is empty")
        keys = tuple(ApiKey(key) if isinstance(key, str) else key for key in self.api_keys)
        object.__setattr__(self, "keyring", Keyring(keys))

    @property
    def apart(self) -> bool:
        """Whether each client has a prefix cache of its own."""
        return len(self.keyring.client_ids) > 1 and not self.share_prefix_cache

    def salt(self, client: Client, given: str = "") -> str:
        """What separates the pages of ``client``, under its own ``cache_salt``, from everybody else's."""
        return f"{client.id}{given}" if self.apart else given

    @property
    def salts(self) -> tuple[str, ...]:
        """The salts of all clients: pages that everybody shall find belong under each."""
        return self.keyring.client_ids if self.apart else ("",)
