"""Teaching a model: recipes as data, the Trainer that follows them, the loss, and the test of recall.

It knows nothing of traces or of a run's folder."""
