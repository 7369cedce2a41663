"""A run's models, sets and questions in the forms that other tools read."""
