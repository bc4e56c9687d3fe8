"""Text, conversations, questions: files to tokens with marked targets."""
