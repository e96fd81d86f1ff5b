"""The client of rnnserve, the server of stateful recurrent models.

`Client` is for threads and `rnnserve.aio.Client`, the same, for asyncio. Errors are one tree under `RnnserveError`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rnnserve import aio, errors
    from rnnserve._notices import Notice
    from rnnserve.client import RNN, Client, Session, SessionGroup
    from rnnserve.codec import TensorError
    from rnnserve.errors import (
        BlobInvalid,
        Cancelled,
        ChunkLost,
        ClientClosed,
        DeadlineExceeded,
        DeployDisabled,
        GroupError,
        InvalidInput,
        InvalidRequest,
        ModelChanged,
        ModelInvalid,
        ModelNotFound,
        ModelUnavailable,
        NotFound,
        OptionUnsupported,
        PermissionDenied,
        QuotaExceeded,
        RequestError,
        RnnserveError,
        ServerBusy,
        ServerError,
        SessionAged,
        SessionClosed,
        SessionEvicted,
        SessionExists,
        SessionExpired,
        SessionNotFound,
        SessionTakenOver,
        SessionUnloaded,
        StepConflict,
        StepMismatch,
        TooLarge,
        Unauthenticated,
        Unavailable,
        VersionExists,
        Violation,
    )
    from rnnserve.models import Model, SessionInfo, StateSpec, TensorSpec
    from rnnserve.options import LayerOptions, ReplayWindow
    from rnnserve.tls import TLS

__all__ = [
    "RNN",
    "TLS",
    "BlobInvalid",
    "Cancelled",
    "ChunkLost",
    "Client",
    "ClientClosed",
    "DeadlineExceeded",
    "DeployDisabled",
    "GroupError",
    "InvalidInput",
    "InvalidRequest",
    "LayerOptions",
    "Model",
    "ModelChanged",
    "ModelInvalid",
    "ModelNotFound",
    "ModelUnavailable",
    "NotFound",
    "Notice",
    "OptionUnsupported",
    "PermissionDenied",
    "QuotaExceeded",
    "ReplayWindow",
    "RequestError",
    "RnnserveError",
    "ServerBusy",
    "ServerError",
    "Session",
    "SessionAged",
    "SessionClosed",
    "SessionEvicted",
    "SessionExists",
    "SessionExpired",
    "SessionGroup",
    "SessionInfo",
    "SessionNotFound",
    "SessionTakenOver",
    "SessionUnloaded",
    "StateSpec",
    "StepConflict",
    "StepMismatch",
    "TensorError",
    "TensorSpec",
    "TooLarge",
    "Unauthenticated",
    "Unavailable",
    "VersionExists",
    "Violation",
    "aio",
    "errors",
]

_MODULES = {"client": ("RNN", "Client", "Session", "SessionGroup"), "codec": ("TensorError",), "_notices": ("Notice",)}
_MODULES |= {"models": ("Model", "SessionInfo", "StateSpec", "TensorSpec"), "options": ("LayerOptions", "ReplayWindow")}
_MODULES["tls"] = ("TLS",)
_HOME = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Imports on first use: the server takes the codec from here and needs no client."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    if name in ("aio", "errors"):
        return import_module(f"{__name__}.{name}")
    value = getattr(import_module(f"{__name__}.{_HOME.get(name, 'errors')}"), name)
    globals()[name] = value
    return value
