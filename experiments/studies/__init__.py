"""Questions that were asked once: each is a script with its committed result."""
