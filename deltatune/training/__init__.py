"""Training on transformers.Trainer and accelerate: the main job, its checkpoints, and what it writes."""
