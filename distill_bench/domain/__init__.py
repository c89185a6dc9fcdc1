"""The embedded domain: moving shapes, corrupted clips, and the teachers in closed form."""
