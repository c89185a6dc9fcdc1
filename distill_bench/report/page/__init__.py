"""The page of a study, report.html: self-contained, without other files or a network."""
