"""Which format each matrix has, and the LoRA tensors that go with it."""
