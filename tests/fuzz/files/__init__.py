"""Files made to do harm: model files, manifests, blobs of sessions and files of principals, and what becomes of them."""
