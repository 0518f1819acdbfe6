"""The paper's evaluation: its grid of cells, and the tables, figures, claims and report that are made from them."""
