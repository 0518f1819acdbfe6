"""What is trained, saved and decoded with."""
