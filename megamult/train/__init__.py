"""Training, from a configuration to a trained model: command line, engine, loop, run directory."""
