"""Training: recipes, one step loop, checkpoints; contrastive, causal and by distillation."""
