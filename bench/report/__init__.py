"""Tables and the picture, out of the JSON files: `python bench/report`."""
