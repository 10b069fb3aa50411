"""Methods that parametrize the projections of a model: one file a method, found by name."""
