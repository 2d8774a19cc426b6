"""From resolved options to a running job and back."""
