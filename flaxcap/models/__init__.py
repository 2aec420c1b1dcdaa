"""Caption decoders and their layers."""
