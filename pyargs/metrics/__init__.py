"""One file per metric. They take tensors or texts and return plain numbers; none of them knows a knob of any method."""
