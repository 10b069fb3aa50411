"""Documents -> shuffled, tokenized, padded or packed batches, each with the state to resume after it."""
