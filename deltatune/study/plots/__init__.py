"""Pictures of reports: in each file a function that returns data, and one that draws it."""
