"""The page of a study: report.html, which needs no other file and no network."""
