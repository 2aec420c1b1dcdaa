"""Batches: which captions share a step, and their way onto the devices."""
