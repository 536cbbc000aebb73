"""Whether the trainings keep what their guarantees say, tried out on the code that trains."""
