"""How to run any importable callable on the nodes of a cluster. Nothing is here yet; `docs/log.md` says what comes."""
