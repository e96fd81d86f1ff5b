"""Models that come and go while the server runs. What takes a while runs on a thread of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable
from pathlib import Path

import structlog

from rnnserve_models.errors import ModelError
from rnnserve_models.load import LoadedModel
from rnnserve_server.config import Settings
from rnnserve_server.errors import (
    DeployDisabled,
    InvalidRequest,
    ModelInvalid,
    ModelUnavailable,
    ModelUnknown,
    TooLarge,
    VersionExists,
)
from rnnserve_server.repository import Repository

log = structlog.get_logger(__name__)

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

Write = Callable[[Path], list[str]]
"""Writes ``model.yaml`` and its files into an empty directory, and returns what it found, a sentence each."""


class Deployer:
    """Changes what a repository serves, if the settings allow it. One change at a time."""

    def __init__(self, settings: Settings, repository: Repository) -> None:
        self._settings = settings
        self._repository = repository
        self._lock = asyncio.Lock()

    async def deploy(self, name: str, version: str, size: int, write: Write) -> tuple[LoadedModel, list[str]]:
        """Adds a version of a model.

        Args:
            name: the model's name.
            version: the version; empty for the next number.
            size: bytes of what it is made from.
            write: writes the model directory. Runs on another thread.

        Returns:
            The model, which is served from now on, and what ``write`` found.

        Raises:
            DeployDisabled: the settings do not allow it.
            InvalidRequest: the name or version has other characters than it may.
            TooLarge: it is larger than the settings allow.
            VersionExists: the version is there.
            ModelInvalid: it is no model.
            ModelUnavailable: the models' folder cannot be written to.
        """
        self._check_allowed()
        for field, value in (("name", name), *((("version", version),) if version else ())):
            if not _NAME.fullmatch(value):
                raise InvalidRequest(field, "1 to 64 characters from A-Z a-z 0-9 . _ -", repr(value[:200]))
        if size > self._settings.max_model_bytes:
            raise TooLarge("source", self._settings.max_model_bytes, size)
        async with self._lock:
            known = {*self._repository.versions(name), *(path.name for path in self._repository.directories(name))}
            version = version or str(max([int(each) for each in known if each.isdecimal()], default=0) + 1)
            if version in known:
                raise VersionExists(
                    f"model {name!r} has a version {version!r} already; name another, or none to have the next",
                    metadata={"field": "version", "got": version},
                )
            model, findings = await asyncio.to_thread(self._place, name, version, write)
            self._repository.put(name, version, model)
        log.info("model deployed", model=name, version=version, engine=model.engine.name, digest=model.digest)
        return model, findings

    def unload(self, name: str, version: str) -> list[str]:
        """Takes a version, or all, from what is served, and returns which. Sessions that have it go on.

        Raises:
            DeployDisabled: the settings do not allow it.
            ModelUnknown, VersionUnknown: there is none.
        """
        self._check_allowed()
        gone = self._repository.remove(name, version)
        log.info("model unloaded", model=name, versions=gone)
        return gone

    async def reload(self, name: str) -> list[LoadedModel]:
        """Loads the versions of a model that are in its folder, and returns those that are served then.

        Raises:
            DeployDisabled: the settings do not allow it.
            ModelUnknown: the folder has no such model.
            ModelInvalid: none of its versions can be loaded.
        """
        self._check_allowed()
        if not _NAME.fullmatch(name) or not self._repository.directories(name):
            raise ModelUnknown(f"no model {name!r} in the models' folder", metadata={"field": "name", "got": name})
        async with self._lock:
            served = {model.version: model for model in self._repository if model.name == name}
            reasons = []
            for directory in self._repository.directories(name):
                found = await asyncio.to_thread(self._repository.try_load, directory)
                before = served.get(directory.name)
                if isinstance(found, ModelError):
                    reasons.append(str(found))
                elif before is None or before.digest != found.digest:
                    self._repository.put(name, directory.name, found)
            models = [model for model in self._repository if model.name == name]
        if not models:
            raise ModelInvalid("name", "a version that can be loaded", "; ".join(reasons))
        return models

    def _place(self, name: str, version: str, write: Write) -> tuple[LoadedModel, list[str]]:
        from rnnserve_models.importers.files import place_model  # importers take a while to import

        try:
            return place_model(self._repository.folder, name, version, write, self._repository.load_version)
        except ModelError as error:
            raise ModelInvalid("source", "a model", str(error)) from error
        except OSError as error:
            raise ModelUnavailable(f"the models' folder cannot be written to: {error}") from error

    def _check_allowed(self) -> None:
        if not self._settings.allow_deploy:
            raise DeployDisabled("this server does not let clients change its models; start it with --allow-deploy")
