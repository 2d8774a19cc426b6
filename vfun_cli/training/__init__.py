"""The training plane: everything here may import torch."""
