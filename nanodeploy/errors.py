"""Errors that name who can mend them: each message says what came, what was wanted and what to do."""


class NanoDeployError(Exception):
    """Base of every error that nanodeploy raises on purpose."""


class ConfigError(NanoDeployError):
    """The operator's: a flag, a machine or a model that does not fit. Raised before weights load."""


class CheckpointError(ConfigError):
    """The operator's: a checkpoint that is missing, damaged, or does not fit the model."""


class RequestError(NanoDeployError):
    """The user's: a request that cannot be served. Becomes HTTP 400 with `param` and `code`."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class QueueFullError(NanoDeployError):
    """Too many requests wait already. Becomes HTTP 503 with Retry-After."""


class EngineDeadError(NanoDeployError):
    """The engine process ended or stopped answering. Becomes HTTP 503."""
