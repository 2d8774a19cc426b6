"""What the rows of a dataset say, what their files hold, and where the two disagree. Free of torch."""
