"""One script per claim about speed; results are stored as JSON with the environment they were measured in."""
