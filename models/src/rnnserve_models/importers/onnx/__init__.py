"""Stateless ONNX exports become stateful graphs.

`import_onnx` looks for what a graph remembers within a run (`slots`, `loops`), makes inputs and outputs of it
(`surgery`), finds the batch and time axes by running the original (`axes`), and holds the result against the original
(`check`). What cannot be made stateful, or not proven to be, is refused with the reason.
"""

from rnnserve_models.importers.onnx.stateful import Imported, import_onnx

__all__ = ["Imported", "import_onnx"]
