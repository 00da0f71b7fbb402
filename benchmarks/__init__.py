"""One script per claim about speed; results as JSON with the environment they were made in."""
