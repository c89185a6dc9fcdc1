"""The embedded domain: moving shapes, corrupted clips, and the Gaussian teacher in closed form."""
