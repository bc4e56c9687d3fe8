"""The adapter: a LoRA for any configuration."""
