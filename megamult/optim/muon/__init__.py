"""Muon on logical matrices: the mathematics, the plan of owners, and the exchange between ranks."""
