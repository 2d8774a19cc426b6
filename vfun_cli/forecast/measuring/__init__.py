"""What a training step holds of a device, measured by running it on tensors without values."""
