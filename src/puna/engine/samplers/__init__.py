"""What decides the next token: each sampler's definition, what is done to logits before, and the random numbers."""
