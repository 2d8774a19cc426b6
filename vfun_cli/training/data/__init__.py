"""From the plan to what the transformer reads."""
