"""The kinds of layers, one a file, named as the kind."""
