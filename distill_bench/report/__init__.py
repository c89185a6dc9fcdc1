"""Tables, figures and the page of a sweep. Imports no torch."""
