"""The models that a server hosts: found under a folder, loaded once, told apart by name and version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import structlog

from rnnserve_models.errors import ModelError
from rnnserve_models.load import EngineChoice, LoadedModel, load_model
from rnnserve_server.errors import ModelUnavailable, ModelUnknown, VersionUnknown

log = structlog.get_logger(__name__)


class Repository:
    """Versions of models, by name and newest first."""

    def __init__(self) -> None:
        self._models: dict[str, dict[str, LoadedModel | ModelError]] = {}

    @classmethod
    def load(cls, folder: Path, *, engine: EngineChoice | None = None, threads: int = 1) -> Repository:
        """Loads every ``<name>/<version>/model.yaml`` below a folder.

        A model that cannot be loaded is logged and remembered with the reason; the others are served.

        Raises:
            ModelError: the folder holds no model at all.
        """
        repository = cls()
        for directory in sorted(path.parent for path in folder.glob("*/*/model.yaml")):
            try:
                model = load_model(directory, engine=engine, threads=threads)
            except ModelError as error:
                log.warning("model not served", model=directory.parent.name, version=directory.name, why=str(error))
                repository._put(directory.parent.name, directory.name, error)
            else:
                log.info("model loaded", model=model.name, version=model.version, engine=model.engine.name)
                repository._put(model.name, model.version, model)
        if not repository._models:
            raise ModelError(f"{folder}: no <name>/<version>/model.yaml below it; name the folder with --models")
        return repository

    def get(self, name: str, version: str = "") -> LoadedModel:
        """Finds a model; an empty version is the newest that could be loaded.

        Raises:
            ModelUnknown, VersionUnknown: there is none.
            ModelUnavailable: it could not be loaded.
        """
        versions = self._models.get(name)
        if versions is None:
            raise ModelUnknown(
                f"no model {name!r}; the models are {sorted(self._models)}", metadata={"field": "model", "got": name}
            )
        if version and version not in versions:
            raise VersionUnknown(
                f"model {name!r} has no version {version!r}; it has {list(versions)}",
                metadata={"field": "version", "expected": ", ".join(versions), "got": version},
            )
        candidates = [versions[version]] if version else list(versions.values())
        for model in candidates:
            if isinstance(model, LoadedModel):
                return model
        raise ModelUnavailable(f"model {name!r} could not be loaded: {candidates[0]}", metadata={"field": "model"})

    def __iter__(self) -> Iterator[LoadedModel]:
        """The loaded models, by name, newest version first."""
        for _, versions in sorted(self._models.items()):
            yield from (model for model in versions.values() if isinstance(model, LoadedModel))

    def _put(self, name: str, version: str, model: LoadedModel | ModelError) -> None:
        versions = {**self._models.get(name, {}), version: model}
        self._models[name] = dict(sorted(versions.items(), key=lambda item: _version_key(item[0]), reverse=True))


def _version_key(version: str) -> list[tuple[int, str]]:
    """Orders versions as people do: 10 after 9, 6.2.10 after 6.2.3."""
    return [(int(number), text) if number else (-1, text) for number, text in re.findall(r"(\d+)|(\D+)", version)]
