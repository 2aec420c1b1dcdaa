"""Caption metrics, equal to pycocoevalcap's."""
