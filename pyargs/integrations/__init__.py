"""pyargs inside other people's loops."""
