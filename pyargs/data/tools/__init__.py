"""What the data sets' `build` is made of: sources, hard negatives, simulated users, the folder of a built set, its check."""
