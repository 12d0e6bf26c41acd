"""The slices of parameters that this rank's ZeRO partition holds, for each of DeepSpeed's optimizer classes."""
