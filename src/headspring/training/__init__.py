"""Training: one loop for every trainer, its optimizers, schedules, checkpoints and parallelism."""
