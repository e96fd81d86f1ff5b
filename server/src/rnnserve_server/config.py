"""The settings of a server: read once, validated once, never changed."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator
from pydantic_settings import (
    BaseSettings,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from rnnserve_models.documents import DocumentError, read_yaml

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(gt=0)]
Durability = Literal["none", "interval", "step"]


class ConfigError(ValueError):
    """The file of settings is of no use: the message names it."""


class Settings(BaseSettings):
    """Each is a flag of ``rnnserve serve``, a variable ``RNNSERVE_<NAME>``, or a key of the YAML file that
    ``RNNSERVE_CONFIG`` or ``--config`` names; the first of these that is set wins.
    """

    model_config = SettingsConfigDict(env_prefix="RNNSERVE_", frozen=True, extra="forbid")

    models: Path = Field(Path("models/zoo"), description="the folder of <name>/<version>/model.yaml")
    host: str = Field("127.0.0.1", description="the address to listen on")
    port: Annotated[int, Field(ge=0, le=65535)] = Field(50051, description="the port to listen on; 0 takes a free one")
    engine: Literal["auto", "numpy", "onnx"] | None = Field(
        None, description="run models of cells under this engine, whatever their model.yaml says"
    )
    engine_threads: Positive = Field(1, description="onnxruntime's threads for one operator")

    event_loop: Literal["completion", "uvloop"] = Field(
        "completion", description="what waits for gRPC: the event loop itself, or grpc.aio on uvloop"
    )

    tls_cert: Path | None = Field(None, description="the server's certificate and its chain, in PEM; with tls_key")
    tls_key: Path | None = Field(None, description="its private key, in PEM")
    tls_client_ca: Path | None = Field(
        None, description="roots in PEM, one of which must have signed the certificate that every client shows"
    )
    principals: Path | None = Field(
        None, description="the file of principals, their tokens, roles and quotas; without it everybody may do all"
    )
    quota_sessions: NotNegative = Field(
        0, description="live sessions of a principal at most, unless the file says; 0: no quota"
    )
    quota_rows_per_second: Annotated[float, Field(ge=0)] = Field(
        0.0, description="rows of time steps a second of a principal, unless the file says; 0: no quota"
    )
    quota_state_bytes: NotNegative = Field(
        0, description="bytes of a principal's states in memory at most, unless the file says; 0: no quota"
    )

    allow_deploy: bool = Field(False, description="let clients deploy, unload and reload models")
    max_model_bytes: Positive = Field(256 << 20, description="the largest model that a client may deploy, in bytes")

    max_sessions: Positive = Field(100_000, description="live sessions at most")
    max_state_bytes: Positive = Field(4 << 30, description="bytes of session states at most")
    idle_lifetime: Seconds = Field(3600.0, description="seconds without use after which a session expires")
    max_idle_lifetime: Seconds = Field(86400.0, description="the longest idle lifetime that a client may ask for")

    max_lifetime: Annotated[float, Field(ge=0)] = Field(
        0.0, description="seconds after which a session ends in any case, or sooner if it asks to; 0 for no end"
    )

    evict_idle_seconds: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="a session that was not used for so long may have to make room when the server is full and keeps "
        "sessions in memory only; 0: none has, and new ones are refused",
    )

    oip: bool = Field(True, description="serve clients of Triton and KServe too: the Open Inference Protocol")
    sequence_restart: Literal["restart", "refuse"] = Field(
        "restart", description="what the start of a sequence that is live does: restart it, as Triton does, or fail"
    )

    store: str = Field(
        "",
        description="where sessions are kept: sqlite:///path, redis://host:port/db (Redis or Valkey; rediss:// for "
        "TLS) or unix:///path of their socket; empty: in memory only",
    )
    durability: Durability = Field(
        "step", description="when: with every step, at an interval, or when a session rests and at shutdown (none)"
    )
    store_sync: Literal["full", "normal"] = Field(
        "full",
        description="what an answer waits for with SQLite: full, for the disk; normal, for the operating system, which "
        "no end of the server can harm, but a power cut may cost the last answers",
    )
    store_interval: Seconds = Field(1.0, description="seconds between writes, with durability interval")
    rest_seconds: Seconds = Field(300.0, description="seconds without use after which a stored session leaves memory")

    replay_chunks: Annotated[int, Field(ge=0)] = Field(
        16, description="a session's last answers that are given again when a chunk is sent again; 0 for none"
    )
    replay_bytes: Positive = Field(1 << 20, description="bytes of those answers at most, but for the last one")
    max_replay_bytes: Positive = Field(
        256 << 20,
        description="bytes of all sessions' answers, and of the states before them, at most; those states go first",
    )

    max_batch_rows: Positive = Field(256, description="rows that the engine computes at once, at most")
    slice_steps: Positive = Field(32, description="time steps that the engine computes at once, at most")
    inline_seconds: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="runs expected to take less are not handed to the engine's thread, nor commits to SQLite's; 0 "
        "hands over all; unset: 0.02 where the process has a single core, or else 0.0005",
    )
    max_rollout_steps: Positive = Field(10_000, description="time steps of one rollout at most")
    max_message_bytes: Positive = Field(64 << 20, description="the largest message, in bytes")
    max_chunk_steps: Positive = Field(100_000, description="time steps of one chunk or call at most")
    max_answer_bytes: Positive = Field(
        256 << 20, description="bytes of the outputs that one frame or call may ask for, at most"
    )
    max_batch_size: Positive = Field(4096, description="the largest batch of one call or session, in rows")
    max_lanes: Positive = Field(65536, description="lanes of one stream at most")
    stream_queue_chunks: Positive = Field(4096, description="unanswered chunks of one stream before it is held back")
    stream_queue_bytes: Positive = Field(
        64 << 20, description="bytes of answers that a stream's client has not read before it is held back"
    )
    queue_bytes: Positive = Field(256 << 20, description="input bytes waiting in all before work is refused")

    max_connections: Positive = Field(
        10_000, description="connections at most; the rest are closed at once. The limit of open files bounds them too"
    )
    max_streams: Positive = Field(1000, description="calls and streams of one connection at the same time, at most")
    max_metadata_bytes: Positive = Field(16384, description="the largest metadata of a call, in bytes")
    handshake_seconds: Seconds = Field(10.0, description="seconds that a new connection has to become one of HTTP/2")
    connection_idle_seconds: Annotated[float, Field(ge=0)] = Field(
        600.0, description="seconds after which a connection without calls is closed; 0 for never"
    )
    connection_age_seconds: Annotated[float, Field(ge=0)] = Field(
        0.0, description="seconds after which clients are told to connect anew; 0 for never"
    )
    connection_grace_seconds: Seconds = Field(
        30.0, description="seconds that calls on such a connection have before they are cut"
    )
    keepalive_seconds: Seconds = Field(
        60.0, description="seconds of silence after which the server asks a client whether it is there"
    )
    keepalive_timeout_seconds: Seconds = Field(20.0, description="seconds that it has to answer")
    min_ping_seconds: Annotated[float, Field(ge=0)] = Field(
        5.0, description="a client that asks more often than so is closed, while it says nothing else"
    )

    metrics_port: Annotated[int, Field(ge=0, le=65535)] | None = Field(
        None,
        description="the port of GET /metrics, for Prometheus and rnnserve top; 0 takes a free one; none: no metrics",
    )
    metrics_host: str = Field("", description="the address to answer it on; empty: that of --host")
    traces: Literal["off", "otlp", "console"] | None = Field(
        None, description="where OpenTelemetry spans go; none: to where the variables OTEL_* say, if they are set"
    )
    slow_tick_seconds: Annotated[float, Field(ge=0)] = Field(
        0.0, description="ticks that take longer are logged, one a second at most; 0 for no such lines"
    )
    channelz: bool = Field(False, description="tell about channels and sockets (grpc.channelz.v1)")

    drain_seconds: Seconds = Field(10.0, description="seconds that open streams have to finish after SIGTERM")
    log_format: Literal["console", "json"] = Field("console", description="how log lines look")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="the least severe line shown")

    @model_validator(mode="after")
    def _check_tls(self) -> Settings:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key: expected both or none")
        if self.tls_client_ca is not None and self.tls_cert is None:
            raise ValueError("tls_client_ca: expected with tls_cert and tls_key only")
        return self

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Flags, then the environment, then the file."""
        return init_settings, env_settings, YamlConfigSettingsSource(settings_cls)


def traces_wanted(settings: Settings, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether traces are asked for: by the setting, or else by OpenTelemetry's own variables."""
    if settings.traces is not None:
        return settings.traces != "off"
    if environment.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if exporter := environment.get("OTEL_TRACES_EXPORTER"):
        return exporter != "none"
    return any(environment.get(f"OTEL_EXPORTER_OTLP_{kind}ENDPOINT") for kind in ("", "TRACES_"))


def load_settings(config: Path | None = None, **flags: object) -> Settings:
    """Reads the settings.

    Args:
        config: a YAML file, or None.
        flags: what the command line says; None is not said.

    Raises:
        ConfigError: the file cannot be read or is not a mapping in YAML.
        pydantic.ValidationError: a setting is unknown or has a wrong value.
    """
    said = {name: value for name, value in flags.items() if value is not None}
    if config is None:
        return Settings(**said)  # type: ignore[arg-type]

    try:  # pydantic-settings ignores a file that is not there
        document = read_yaml(config)
    except DocumentError as error:
        raise ConfigError(f"{config}: {error}") from error
    if not isinstance(document, dict | None):
        raise ConfigError(f"{config}: must be a mapping of settings, got {type(document).__name__}")

    class FileSettings(Settings):
        model_config = SettingsConfigDict(yaml_file=config)

    return FileSettings(**said)  # type: ignore[arg-type]
