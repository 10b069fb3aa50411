"""What `sltrain-bench` measures: a layer, an update of a model, or the training stream."""
