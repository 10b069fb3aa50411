"""The kinds of layers: one file a kind, named as the kind."""
