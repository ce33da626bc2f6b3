"""The command: `python -m nibble.launch_server --model-path …`."""

import asyncio
import contextlib
import gc
import logging
import os
import resource
import signal
import socket
import ssl
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import setproctitle
import uvicorn
import uvloop

from nibble.config.command_line import parse_server_args
from nibble.config.resolve import EngineConfig, resolve
from nibble.config.server_args import ServerArgs, non_default_options
from nibble.controller.async_engine import AsyncEngine
from nibble.controller.node_agent import serve_node
from nibble.entrypoints.http_protocol import BoundedHttpProtocol
from nibble.entrypoints.http_server import create_app
from nibble.entrypoints.tls import tls_context
from nibble.observability.logging import configure_logging
from nibble.observability.loop_lag import watch_event_loop
from nibble.observability.metrics import EngineMetrics
from nibble.utils.errors import ConfigError, EngineDeadError
from nibble.utils.stacks import write_stacks_on_signal

logger = logging.getLogger("nibble")

_CLOSE_SECONDS = 5
"""What open connections get to be closed in once nothing runs any more."""
_CLOSE_SECONDS_AT_ONCE = 1
"""The same when the engine has died or is told to stop at once: clients are told, and who doesn't read is left."""

_GARBAGE_THRESHOLD = 20_000
"""Objects by which their number grows before the garbage collector looks at the new ones. A stream has about 230, an
answer leaves none that only the collector would free, and a refusal about 20. With Python's 700 the collector would
hold up a thousand streams again and again, and find nothing."""


def main() -> None:
    try:
        args = parse_server_args(sys.argv[1:])
    except ConfigError as error:
        sys.exit(f"error: {error}")
    serve(args)


def serve(args: ServerArgs) -> NoReturn:
    """Serves until a signal ends it. Exit code 0 then; 1 if it can't start or a process of the engine dies.

    Of several hosts the first one serves, and the others end with it.
    """
    name = "server" if args.node_rank == 0 else f"node {args.node_rank}"
    configure_logging(args.log_level, name, args.log_format)
    setproctitle.setproctitle(f"nibble {name}")
    write_stacks_on_signal(Path(os.devnull))  # as in the ranks, for whoever asks
    try:
        config = resolve(args)
        logger.info("options: %s", non_default_options(args))
        for line in config.decisions():
            logger.info(line)
        if args.node_rank == 0:
            tls = tls_context(args)
            listener = _listen(args)
            _allow_many_connections()
            code = uvloop.run(_serve(config, listener, tls))
        else:
            code = uvloop.run(serve_node(config))
    except ConfigError as error:
        sys.exit(f"error: {error}")
    logging.shutdown()
    os._exit(code)  # a thread that is still busy with a prompt must not hold up the end


def _listen(args: ServerArgs) -> socket.socket:
    """Takes the port, before anything is loaded: of two servers that both bind it only one may listen."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    listener = socket.socket(family)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((args.host, args.port))
        listener.listen()
    except OSError as error:
        raise ConfigError(
            f"can't listen on {args.host} port {args.port}: {error.strerror}; choose another with --host and --port"
        ) from error
    return listener


def _allow_many_connections() -> None:
    """Each connection takes a file descriptor, and the usual soft limit is 1024."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


class _HttpServer(uvicorn.Server):
    """Leaves signals to this module, which drains the engine before it stops the server."""

    close_seconds = _CLOSE_SECONDS

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Cuts off who has not read the end by the deadline. uvicorn would cancel them, with a traceback for each."""
        self.config.timeout_graceful_shutdown = self.close_seconds + 1  # for a handler that goes on all the same
        cutting = asyncio.get_running_loop().call_later(self.close_seconds, self._cut_connections)
        await super().shutdown(sockets)
        cutting.cancel()

    def _cut_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()


async def _serve(config: EngineConfig, listener: socket.socket, tls: ssl.SSLContext | None) -> int:
    """The exit code. Raises ConfigError when there is no tokenizer to serve with."""
    started = time.monotonic()
    args = config.args

    def on_dead(reason: str) -> None:
        logger.error("the engine died: %s", reason)
        server.close_seconds = _CLOSE_SECONDS_AT_ONCE
        server.should_exit = True

    engine = AsyncEngine(config, on_dead)
    if args.tool_call_parser is not None and not engine.tokenizer.template_shows_tools():
        logger.warning(
            "the chat template does not tell the model of functions: it calls them only where tool_choice makes it. "
            "Put a chat_template.jinja that does beside the tokenizer (--tokenizer-path)"
        )
    metrics = None
    if args.enable_metrics:
        metrics = EngineMetrics(engine.served_model_name, engine.dp_size, config.fp4_allgather.enabled)
        engine.on_rank_stats = metrics.on_rank_stats
    app = create_app(
        engine,
        api_key=args.api_key,
        admin_api_key=args.admin_api_key,
        max_request_bytes=args.max_request_bytes,
        metrics=metrics,
        log_requests_level=args.log_requests_level if args.log_requests else None,
        tool_call_parser=args.tool_call_parser,
        reasoning_parser=args.reasoning_parser,
    )
    server = _HttpServer(
        uvicorn.Config(
            app,
            http=BoundedHttpProtocol,
            ssl_context_factory=None if tls is None else lambda *_: tls,
            log_config=None,  # its warnings look like all other lines
            log_level="warning",
            access_log=False,
        )
    )
    stop = asyncio.create_task(_stop_on_signal(engine, server, args.drain_timeout))
    serving = asyncio.create_task(server.serve(sockets=[listener]))
    starting = asyncio.create_task(engine.start())
    watching = asyncio.create_task(watch_event_loop(metrics.on_loop_lag)) if metrics is not None else None
    try:
        await asyncio.wait([starting, stop, serving], return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            _collect_garbage_rarely()
            host, port = listener.getsockname()[:2]
            logger.info(
                "ready after %.1f s: %s://%s:%d serves %s on tp=%d dp=%d ep=%d, FP4 all-gather %s",
                time.monotonic() - started,
                "http" if tls is None else "https",
                f"[{host}]" if ":" in host else host,
                port,
                engine.served_model_name,
                config.parallel.tp_size,
                config.parallel.dp_size,
                config.parallel.ep_size,
                "on" if config.fp4_allgather.enabled else "off",
            )
        await serving
    except (ConfigError, EngineDeadError) as error:
        if engine.state() != "dead":  # else on_dead has said it
            logger.error("%s", error)
        server.should_exit = True
        await serving
        return 1
    finally:
        died = engine.state() == "dead"
        starting.cancel()
        stop.cancel()
        if watching is not None:
            watching.cancel()
        await engine.stop()
    return 1 if died else 0


def _collect_garbage_rarely() -> None:
    gc.collect()
    gc.freeze()  # what is loaded stays, and need not be looked at again
    gc.set_threshold(_GARBAGE_THRESHOLD)


async def _stop_on_signal(engine: AsyncEngine, server: _HttpServer, drain_timeout: float) -> None:
    """First SIGINT or SIGTERM: finish what runs, then stop. A second one: stop now."""
    signals: asyncio.Queue[signal.Signals] = asyncio.Queue()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, signals.put_nowait, number)
    received = await signals.get()
    logger.info("%s: finishing what runs, at most %g s; once more to stop at once", received.name, drain_timeout)
    if engine.state() == "ready":
        draining = asyncio.create_task(engine.drain(drain_timeout))
        second = asyncio.create_task(signals.get())
        await asyncio.wait([draining, second], return_when=asyncio.FIRST_COMPLETED)
        if second.done():
            draining.cancel()
            engine.end_requests("the server was told to stop at once")
            server.close_seconds = _CLOSE_SECONDS_AT_ONCE
    server.should_exit = True


if __name__ == "__main__":
    main()
