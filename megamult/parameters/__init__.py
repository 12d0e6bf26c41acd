"""What a parameter is, and which part of it an interval of a shard holds."""
