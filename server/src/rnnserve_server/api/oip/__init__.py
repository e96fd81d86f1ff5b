"""The Open Inference Protocol, as clients of Triton and KServe speak it, over the same sessions and scheduler."""
