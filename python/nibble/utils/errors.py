"""Errors that are meant for people, as opposed to bugs."""


class ConfigError(ValueError):
    """The flags, the checkpoint and the machine do not fit together. The message says how to mend it."""


class RequestError(ValueError):
    """A request that can't be served as asked (HTTP 400). `field` names the parameter at fault."""

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.field = field


class OverloadedError(RuntimeError):
    """The engine takes no new work now: queue full, draining or not ready (HTTP 503)."""


class EngineDeadError(RuntimeError):
    """A process of the engine died; nothing can be served any more."""
