"""`kcfi-tiny`, which is installed with its weights, and the settings and cards of models of pretrained towers."""
