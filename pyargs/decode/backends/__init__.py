"""How a step's passes are run: eager (any model of transformers), cpu (the C++ stack), cuda_graph (the step as one graph)."""
