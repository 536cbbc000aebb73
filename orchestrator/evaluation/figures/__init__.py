"""What an evaluation found, drawn: one function a figure, from reports to matplotlib figures."""
