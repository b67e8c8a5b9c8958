"""Expert pruning of mixture-of-experts translators."""
