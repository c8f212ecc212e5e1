"""How calls are spelled inside a call section, one file a way: JSON objects, XML, Python, headers."""
