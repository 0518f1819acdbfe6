"""Published sets whose files load as they are; `load(source, ...)` gives the pairs."""
