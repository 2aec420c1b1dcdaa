"""Captions from a decoder: greedy, sampling, beam search."""
