"""Language models: their weights, tokenizers and log-probs, and what they cost on a device."""
