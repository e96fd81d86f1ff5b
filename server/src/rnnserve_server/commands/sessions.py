"""``rnnserve sessions``: look at the sessions of a server, save them and end them.

gRPC is loaded when it is used: a command that serves has to say something to it first, see `process`.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from rnnserve._connection import Connection
    from rnnserve.models import SessionInfo

T = TypeVar("T")

_WIDTH = 200  # columns, where there is no terminal

_HOW: ContextVar[dict[str, Any]] = ContextVar("how to connect")

app = typer.Typer(help="Look at the sessions of a server, save them and end them.", no_args_is_help=True)

Address = Annotated[str, typer.Option(help="the server's address [127.0.0.1 and RNNSERVE_PORT]")]
Timeout = Annotated[float, typer.Option(help="seconds to wait for an answer")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON, a session a line")]
Id = Annotated[str, typer.Argument(metavar="ID", help="the session's id")]


@app.callback()
def connect(
    token: Annotated[str, typer.Option(help="the token to show", envvar="RNNSERVE_TOKEN")] = "",
    tls_ca: Annotated[
        Path | None, typer.Option(help="the root of the server's certificate, in PEM, if it has TLS", exists=True)
    ] = None,
    tls_cert: Annotated[Path | None, typer.Option(help="a certificate to show, in PEM", exists=True)] = None,
    tls_key: Annotated[Path | None, typer.Option(help="its private key, in PEM", exists=True)] = None,
) -> None:
    """Keeps how to connect for the commands."""
    from rnnserve.tls import TLS

    tls = None if tls_ca is None else TLS(tls_ca, tls_cert, tls_key)
    _HOW.set({"token": token or None, "tls": tls})


@app.command("ls")
def list_sessions(
    model: Annotated[str, typer.Option(help="only those of this model")] = "",
    limit: Annotated[int, typer.Option(help="so many at most; 0 for all", min=0)] = 1000,
    as_json: AsJson = False,
    address: Address = "",
    timeout: Timeout = 10.0,
) -> None:
    """List the live sessions, oldest first: those in the store too, if there is one."""

    async def listed(connection: Connection) -> list[SessionInfo]:
        found: list[SessionInfo] = []
        token = ""
        while not limit or len(found) < limit:
            page, token = await connection.sessions_page(model, token, None)
            found += page
            if not token:
                break
        return found[: limit or None]

    sessions = _ask(address, timeout, listed)
    if as_json:
        for session in sessions:
            typer.echo(_json(session))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, padding=(0, 2, 0, 0))
    for name in ("session", "model", "batch", "step", "created", "idle lifetime"):
        table.add_column(name, no_wrap=True, overflow="fold")
    for session in sessions:
        table.add_row(
            session.session_id,
            f"{session.model} {session.version}",
            str(session.batch_size),
            str(session.step),
            f"{session.create_time:%Y-%m-%d %H:%M:%S}",
            f"{session.idle_lifetime:g} s",
        )
    console = Console()
    (console if console.is_terminal else Console(width=_WIDTH)).print(table)


@app.command("show")
def show_session(session_id: Id, as_json: AsJson = False, address: Address = "", timeout: Timeout = 10.0) -> None:
    """Show a session, without using it."""
    session = _ask(address, timeout, lambda connection: connection.get_session(session_id, None))
    if as_json:
        typer.echo(_json(session))
        return
    for name, value in _facts(session).items():
        if isinstance(value, dict):
            value = ", ".join(key for key, on in value.items() if on) or "none"
        typer.echo(f"{name:14} {value}")


@app.command("save")
def save_session(
    session_id: Id,
    path: Annotated[Path, typer.Argument(help="the file to write, for Client.restore", dir_okay=False)],
    address: Address = "",
    timeout: Timeout = 60.0,
) -> None:
    """Write a session to a file, behind the chunks that came before. It goes on."""
    from rnnserve._states import write
    from rnnserve.v1.session_pb2 import ExportSessionRequest
    from rnnserve.v1.session_pb2_grpc import SessionServiceStub

    async def saved(connection: Connection) -> int:
        request = ExportSessionRequest(session_id=session_id)
        response = await connection.unary(SessionServiceStub(connection.channel()).ExportSession, request, None)
        await asyncio.to_thread(write, path, response.blob)
        return len(response.blob)

    typer.echo(f"{path}: {_ask(address, timeout, saved)} bytes")


@app.command("rm")
def remove_sessions(
    session_ids: Annotated[list[str], typer.Argument(metavar="ID...", help="their ids")],
    address: Address = "",
    timeout: Timeout = 10.0,
) -> None:
    """End sessions and forget their states. All are tried; the exit code is 1 if one could not be ended."""
    from rnnserve.errors import RnnserveError
    from rnnserve.v1.session_pb2 import DeleteSessionRequest
    from rnnserve.v1.session_pb2_grpc import SessionServiceStub

    async def removed(connection: Connection) -> dict[str, str]:
        stub, troubles = SessionServiceStub(connection.channel()), dict[str, str]()
        for session_id in session_ids:
            request = DeleteSessionRequest(session_id=session_id)
            try:
                await connection.unary(stub.DeleteSession, request, None)
            except RnnserveError as error:
                troubles[session_id] = str(error)
        return troubles

    troubles = _ask(address, timeout, removed)
    for session_id in session_ids:
        typer.echo(f"{session_id}: {troubles.get(session_id, 'ended')}", err=session_id in troubles)
    if troubles:
        raise typer.Exit(1)


def _ask(address: str, timeout: float, question: Callable[[Connection], Awaitable[T]]) -> T:
    """Asks a server something. Failures end the command with 1 and the reason."""
    from rnnserve._connection import Connection
    from rnnserve.errors import RnnserveError

    address = address or f"127.0.0.1:{os.environ.get('RNNSERVE_PORT', 50051)}"

    async def ask() -> T:
        connection = Connection(address, timeout, None, (), retry_for=0.0, **_HOW.get())
        try:
            return await question(connection)
        finally:
            await connection.close()

    try:
        return asyncio.run(ask())
    except (RnnserveError, OSError, ValueError) as error:
        typer.echo(f"{address}: {error}", err=True)
        raise typer.Exit(1) from error


def _facts(session: SessionInfo) -> dict[str, Any]:
    return {**asdict(session), "create_time": session.create_time.isoformat()}


def _json(session: SessionInfo) -> str:
    return json.dumps(_facts(session))
