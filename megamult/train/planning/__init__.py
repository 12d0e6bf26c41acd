"""Memory, traffic and time of a run, computed before it runs."""
