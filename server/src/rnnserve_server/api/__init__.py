"""The doors: one file per gRPC service, and `errors`, where every failure becomes a status."""
