"""The run directory: every path in it, who may use it, and what processes leave each other there."""
