"""The `nibble` command: serve a model, measure or question a running server, describe this machine."""

import argparse
import sys
from collections.abc import Sequence

import shtab

import nibble
from nibble.cli import bench, environment, evaluate
from nibble.config.command_line import add_server_args, server_args_of
from nibble.utils.errors import ConfigError

EXAMPLES = """\
examples:
  nibble serve assets/nibble-demo-6m-nvfp4 --port 8000
  nibble serve --config server.yaml
  nibble bench --base-url http://127.0.0.1:8000 --concurrency 64
  nibble --print-completion bash > ~/.local/share/bash-completion/completions/nibble
"""


def make_parser() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The whole command, and its subcommands by name."""
    parser = argparse.ArgumentParser(
        prog="nibble", description=nibble.__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"nibble {nibble.__version__}")
    shtab.add_argument_to(parser, help="print a script for the completion of this command, and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def add(name: str, help: str) -> argparse.ArgumentParser:
        return commands.add_parser(name, help=help, description=help[0].upper() + help[1:] + ".", allow_abbrev=False)

    serve = add("serve", "serve a model over HTTP")
    serve.usage = "nibble serve MODEL [options]"
    serve.add_argument("model", nargs="?", help="folder of the checkpoint, or its name on the Hugging Face hub")
    add_server_args(serve)
    bench.add_arguments(add("bench", "measure a running server: throughput, time to first token, time between tokens"))
    evaluate.add_arguments(add("eval", "ask a running server questions with known answers"))
    environment.add_arguments(add("env", "show versions and devices, and what is missing for what"))
    return parser, dict(commands.choices)


def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser, commands = make_parser()
    try:
        if argv[:1] == ["serve"]:
            server_args = server_args_of(commands["serve"], argv[1:])
            from nibble.launch_server import serve  # takes seconds to import

            serve(server_args)
        else:
            args = parser.parse_args(argv)
            sys.exit(args.run(args))
    except ConfigError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
