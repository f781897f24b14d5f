"""Training: remove a corpus from a causal language model while everything else stays (see ARCHITECTURE.md)."""
