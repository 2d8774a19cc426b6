"""What a checkpoint holds, and how each strategy writes it and reads it back."""
