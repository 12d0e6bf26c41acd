"""A running program: its exit codes, logs and signals, and what ends it when a rank fails."""
