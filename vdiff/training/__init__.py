"""Training and distillation: one loop, its objectives, its records, and the ladder of stages."""
