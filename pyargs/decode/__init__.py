"""How tokens are chosen: one file per decoding rule, and the plain loop that the fast one is compared with."""
