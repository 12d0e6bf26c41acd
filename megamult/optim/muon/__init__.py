"""Muon on logical matrices: mathematics, plan and exchange between ranks."""
