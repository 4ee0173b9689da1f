"""The machinery under the concepts: decoding, kernels, log-probs, checkpoints. It imports nothing of the root but dist."""
