"""Training and adaptation, the same for all methods: full (LoRA and head together) or on features of a frozen backbone."""
