"""What is learned: task specifications, losses, metrics and data sets."""
