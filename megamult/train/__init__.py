"""From a configuration to a trained model: engine, loop, command line."""
