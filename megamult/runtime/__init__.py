"""Support for running programs: exit codes, logs, signals, locks, and a watchdog that ends a run if a rank fails."""
