"""A run, a study of runs, and the comparison of given models: settings, stages, and what they save."""
