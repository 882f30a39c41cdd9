"""What `scripts.measure_store` measures: readiness, restoring, writing."""
