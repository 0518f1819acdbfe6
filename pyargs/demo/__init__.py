"""What `pyargs demo` does: run (from pairs to guided answers, measured), page (what it prints and writes of them)."""
