"""Files on disk: atomic writes, checksums, parameters, locks, size limits."""
