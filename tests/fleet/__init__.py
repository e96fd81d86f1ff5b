"""Sessions that stream while replicas come and go."""
