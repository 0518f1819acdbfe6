"""From a saved model to the hub: a folder without anything of the owner's machine, a card, and the upload."""
