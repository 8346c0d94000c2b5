"""Generation: prompts in, responses out, on the weights that are being trained."""
