"""Language models, one folder per architecture."""
