"""What an evaluation measures and shows."""
