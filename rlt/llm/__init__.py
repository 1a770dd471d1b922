"""Language models: weights, tokenizers, log-probs, and what they cost on a device."""
