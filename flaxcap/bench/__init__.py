"""Benchmarks of training, decoding, extraction, input and scoring."""
