"""How the two towers of kcfi-tiny are made."""
