"""Files made to do harm: model files, manifests, exported sessions, principals and certificates."""
