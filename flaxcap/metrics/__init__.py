"""Caption metrics, equal to those of pycocoevalcap, and diagnostics of captions."""
