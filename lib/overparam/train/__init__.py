"""Training loops and the checkpoints they resume from: contrastive, causal, distillation."""
