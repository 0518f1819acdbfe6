"""What runs a language model: where its files come from, text to ids, forward passes, caches."""
