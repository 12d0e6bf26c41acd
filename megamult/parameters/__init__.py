"""Descriptions of parameters: what each one is, and which part of it an interval of a shard holds."""
