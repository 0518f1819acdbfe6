"""The decoder stack in C++ (csrc/stack): pack (weights into a stack), run (passes), keep (one stack for each model)."""
