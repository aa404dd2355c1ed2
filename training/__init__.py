"""Training and evaluation: data sets, collator, trainer, scores and the recipes that `kcfi train` reads."""
