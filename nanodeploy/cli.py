"""The command line: `nanodeploy serve MODEL`, `nanodeploy tune`. Heavy imports wait until a command needs them."""

import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import NoReturn

from nanodeploy import flags
from nanodeploy.errors import ConfigError

COMMANDS = {
    "serve": "serve a model over HTTP, as OpenAI's API does",
    "tune": "measure the kernels on this GPU, so that the fastest are chosen here",
}
ENGINE = "nanodeploy.runtime.engine:Engine"


def main(argv: Sequence[str] | None = None, engine: str = ENGINE) -> int:
    """Run one command and return its exit code. A mistake of the operator's is one line on stderr, never a traceback.

    `engine` names the Engine class that the engine process is to build, as module:Class.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(argv, engine)
    except flags.Help as help_text:
        print(help_text, end="")
        return 0
    except ConfigError as error:
        print("nanodeploy: error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2 if isinstance(error, flags.UsageError) else 1


def _run(argv: list[str], engine: str) -> int:
    command = argv[0] if argv else "--help"
    if command in ("-h", "--help"):
        lines = "".join(f"  {name:10}{text}\n" for name, text in COMMANDS.items())
        raise flags.Help(
            f"usage: nanodeploy COMMAND [--flag value ...]\n\n{lines}\n"
            "  --help     this text; nanodeploy COMMAND --help lists a command's flags\n"
            "  --version  the version\n"
        )
    if command in ("-V", "--version"):
        print(f"nanodeploy {_version()}")
        return 0
    if command == "serve":
        return _serve(argv[1:], engine)
    if command == "tune":
        from nanodeploy import tune

        return tune.main(argv[1:])
    raise flags.UsageError(f"{command} is not a command.{flags.suggest(command, COMMANDS)} See nanodeploy --help.")


def _serve(argv: list[str], engine: str) -> int:
    """Everything that can be wrong is looked at in order of cost: flags, model files, the port, then the engine."""
    config = flags.parse(argv, "nanodeploy serve")
    from nanodeploy import catalog
    from nanodeploy.serve import launch, parsers

    for number in (signal.SIGINT, signal.SIGTERM):  # until the server has its own, so that nothing is left behind
        signal.signal(number, _leave)
    parsers.choose(None, None, config.tool_call_parser, config.reasoning_parser)
    files = catalog.locate(config.model, config.tokenizer)
    with launch.listen(config.host, config.port) as listener, launch.EngineProcess(config, engine) as process:
        from nanodeploy.serve import server  # after the engine was started: the two load side by side

        return server.run(config, files, listener, process)


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(0)


def _version() -> str:
    import importlib.metadata

    try:
        return importlib.metadata.version("nanodeploy")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    sys.exit(main())
