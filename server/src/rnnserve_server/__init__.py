"""The rnnserve server: wire, sessions, scheduler and worker around the engines of `rnnserve_models`."""

import rnnserve_models  # noqa: F401  # before onnxruntime is loaded, by whatever of the server
