"""From a model directory of Triton to one of ours."""
