"""The tokenize job: raw corpora in, a versioned token dataset out. `braid tokenize RECIPE.yaml` comes here."""
