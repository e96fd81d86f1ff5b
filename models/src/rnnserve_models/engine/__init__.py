"""What computes: one function over a ragged batch, in NumPy or under onnxruntime."""

from rnnserve_models.engine.base import Engine, EngineError

__all__ = ["Engine", "EngineError"]
