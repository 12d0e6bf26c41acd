"""Processes: how they meet, their devices, and the process grid that they form."""
