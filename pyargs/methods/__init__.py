"""One file per method: `Config`, `build`, `loss`, and where the method needs them `adapt`, `groups`, `turns`."""
