"""The rnnserve server: wire, sessions, scheduler and worker around the engines of `rnnserve_models`."""
