"""Text: words, the vocabulary, token ids."""
