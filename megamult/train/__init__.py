"""Training: what leads from a configuration to a trained model (engine, loop, command line)."""
