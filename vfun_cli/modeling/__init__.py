"""What families are built from; knows no trainer."""
