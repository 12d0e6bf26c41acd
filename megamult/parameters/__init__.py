"""Descriptions of parameters: what each parameter is, and which of its elements an interval of its shard holds."""
