"""What the methods are worth: each trains on three tasks and answers questions that it never saw."""
