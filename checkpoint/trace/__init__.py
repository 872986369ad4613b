"""The structure of models, found by watching their blocks compute."""
