"""The embedded domain: moving shapes, known-bad clips, and the Gaussian teacher in closed form."""
