"""What people outside rely on: the rows of the HTTP table and every refusal, against the real service."""
