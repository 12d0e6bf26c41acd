"""Which slice of which parameter this rank's ZeRO partition holds, for each of DeepSpeed's optimizer classes."""
