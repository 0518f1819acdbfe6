"""One file per method: `Config`, `build`, `loss`, and where the method needs them `warm_start`, `parameter_groups`,
`turns`, `finish`, `support`, `adapt`."""
