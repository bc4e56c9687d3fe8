"""Text, conversations and questions: from files to tokens with marked targets."""
