"""Writes silero_aepyx.json: the probabilities that Silero's own Python wrapper gives for a real recording.

The tests compare the server with them; the script is not needed to run the tests. Run it from the repository's root:

    pip install -e models pytest 'torch==2.13.0' 'silero-vad[onnx-cpu]==6.2.3' 'onnxruntime==1.32.0'
    PYTHONPATH=tests python tests/vectors/make_silero.py

The wrapper is called frame by frame, and once over the whole recording with its ``audio_forward``: the script fails
unless both give the same bits.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
import warnings
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import numpy as np
import torch
from silero_vad import load_silero_vad

from speech import SAMPLE_RATE, SPEECH, speech_file, speech_frames

VECTORS = Path(__file__).with_name("silero_aepyx.json")
MODEL = "silero_vad_16k_op15.onnx"


def main() -> None:
    warnings.filterwarnings("ignore", message="This model support only 16000 sampling rate")
    frames = torch.from_numpy(speech_frames())
    wrapper = load_silero_vad(onnx=True, opset_version=15)
    stepwise = np.concatenate([wrapper(frame, SAMPLE_RATE).numpy().ravel() for frame in frames])
    whole = wrapper.audio_forward(frames.reshape(-1), SAMPLE_RATE).numpy().ravel()
    if stepwise.tobytes() != whole.tobytes():
        sys.exit("the wrapper frame by frame and its audio_forward differ")

    torchscript = load_silero_vad().audio_forward(frames.reshape(-1), SAMPLE_RATE).numpy().ravel()
    print(f"{len(stepwise)} frames, probabilities {stepwise.min():.6f} to {stepwise.max():.6f}")
    print(f"speech (at least 0.5): {np.count_nonzero(stepwise >= 0.5)} frames")
    print(f"the package's TorchScript model differs by at most {np.abs(torchscript - stepwise).max():.2e}")

    about = {
        "made_by": "tests/vectors/make_silero.py",
        "versions": {name: version(name) for name in ("silero-vad", "torch", "onnxruntime", "numpy")},
        "machine": platform.machine(),
        "recording": {"path": SPEECH.path, "sha256": hashlib.sha256(speech_file().read_bytes()).hexdigest()},
        "model": {
            "path": f"silero_vad/data/{MODEL}",
            "sha256": hashlib.sha256(files("silero_vad.data").joinpath(MODEL).read_bytes()).hexdigest(),
        },
        "sample_rate": SAMPLE_RATE,
        "frame": int(frames.shape[1]),
    }
    # The shortest decimals that are read back as the same float32.
    figures = [str(probability) for probability in stepwise]
    rows = ",\n".join("  " + ", ".join(figures[start : start + 10]) for start in range(0, len(figures), 10))
    VECTORS.write_text(f'{json.dumps(about, indent=1)[:-2]},\n "probabilities": [\n{rows}\n ]\n}}\n', encoding="utf-8")
    read = np.array(json.loads(VECTORS.read_text(encoding="utf-8"))["probabilities"], np.float32)
    if read.tobytes() != stepwise.tobytes():
        sys.exit(f"{VECTORS.name} is not read back as the same float32 figures")


if __name__ == "__main__":
    main()
