"""What `sltrain-bench` measures: one layer, one update of a model, or the training stream."""
