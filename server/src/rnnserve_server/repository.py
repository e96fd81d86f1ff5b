"""The models that a server hosts: found under a folder, loaded once, told apart by name and version."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import structlog

from rnnserve_models.errors import ModelError
from rnnserve_models.load import EngineChoice, LoadedModel, load_model
from rnnserve_server.errors import ModelChanged, ModelUnavailable, ModelUnknown, VersionUnknown

log = structlog.get_logger(__name__)


class Repository:
    """Versions of models, by name and newest first."""

    def __init__(self, folder: Path, *, engine: EngineChoice | None = None, threads: int = 1) -> None:
        """Begins without models.

        Args:
            folder: where ``<name>/<version>/model.yaml`` are.
            engine: for models of cells, whatever their ``model.yaml`` says.
            threads: of onnxruntime, for one operator.
        """
        self.folder = folder
        self._engine = engine
        self._threads = threads
        self._models: dict[str, dict[str, LoadedModel | ModelError]] = {}

    @classmethod
    def load(cls, folder: Path, *, engine: EngineChoice | None = None, threads: int = 1) -> Repository:
        """Loads every ``<name>/<version>/model.yaml`` below a folder.

        A model that cannot be loaded is logged and remembered with the reason; the others are served.

        Raises:
            ModelError: the folder holds no model at all.
        """
        repository = cls(folder, engine=engine, threads=threads)
        for directory in repository.directories("*"):
            repository.put(directory.parent.name, directory.name, repository.try_load(directory))
        if not repository._models:
            raise ModelError(f"{folder}: no <name>/<version>/model.yaml below it; name the folder with --models")
        return repository

    def directories(self, name: str) -> list[Path]:
        """The model directories of a model, or of all for "*"."""
        return sorted(path.parent for path in self.folder.glob(f"{name}/*/model.yaml"))

    def load_version(self, directory: Path) -> LoadedModel:
        """Loads a model directory. Takes a while, and may be called on any thread.

        Raises:
            ModelError: it does not hold a model.
        """
        return load_model(directory, engine=self._engine, threads=self._threads)

    def try_load(self, directory: Path) -> LoadedModel | ModelError:
        """Loads a model directory, or says why not, which is logged. As `load_version` otherwise."""
        try:
            model = self.load_version(directory)
        except ModelError as error:
            log.warning("model not served", model=directory.parent.name, version=directory.name, why=str(error))
            return error
        why = {"why": model.engine.reason} if model.engine.reason else {}
        log.info("model loaded", model=model.name, version=model.version, engine=model.engine.name, **why)
        return model

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

    def with_digest(self, name: str, version: str, digest: str) -> LoadedModel:
        """Finds the very model that a stored session had.

        Raises:
            ModelChanged: it is not served any more.
        """
        model = self._models.get(name, {}).get(version)
        if isinstance(model, LoadedModel) and model.digest == digest:
            return model
        got = model.digest if isinstance(model, LoadedModel) else "none"
        raise ModelChanged(
            f"the session's model is {name!r} version {version!r} with digest {digest}, which is not served any more "
            f"(here: {got}); its states mean nothing to other weights: serve that model again, or make a new session",
            metadata={"field": "digest", "expected": digest, "got": got},
        )

    def __iter__(self) -> Iterator[LoadedModel]:
        """The loaded models, by name, newest version first."""
        for _, versions in sorted(self._models.items()):
            yield from (model for model in versions.values() if isinstance(model, LoadedModel))

    def index(self) -> Iterator[tuple[str, str, LoadedModel | ModelError]]:
        """Every version that is known, by name, newest first: the model, or why it could not be loaded."""
        for name, versions in sorted(self._models.items()):
            yield from ((name, version, model) for version, model in versions.items())

    def __contains__(self, model: LoadedModel) -> bool:
        """Whether this very model is served to new calls."""
        return self._models.get(model.name, {}).get(model.version) is model

    def versions(self, name: str) -> list[str]:
        """The versions of a model, those that could not be loaded too, newest first; none for an unknown name."""
        return list(self._models.get(name, ()))

    def put(self, name: str, version: str, model: LoadedModel | ModelError) -> None:
        """Serves a version, or remembers why it is not."""
        versions = {**self._models.get(name, {}), version: model}
        self._models[name] = dict(sorted(versions.items(), key=lambda item: _version_key(item[0]), reverse=True))

    def remove(self, name: str, version: str = "") -> list[str]:
        """Takes a version, or all versions, from what is served, and returns them.

        Raises:
            ModelUnknown, VersionUnknown: there is none.
        """
        if name not in self._models or (version and version not in self._models[name]):
            self.get(name, version)  # says so
        gone = [version] if version else list(self._models[name])
        left = {key: model for key, model in self._models[name].items() if key not in gone}
        if left:
            self._models[name] = left
        else:
            del self._models[name]
        return gone


def _version_key(version: str) -> list[tuple[int, str]]:
    """Orders versions as people do: 10 after 9, 6.2.10 after 6.2.3."""
    return [(int(number), text) if number else (-1, text) for number, text in re.findall(r"(\d+)|(\D+)", version)]
