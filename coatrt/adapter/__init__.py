"""The LoRA for any configuration."""
