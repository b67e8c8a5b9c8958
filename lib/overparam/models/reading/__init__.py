"""How a text becomes tokens, and token states one vector: instructions, templates, pooling."""
