"""What every other folder stands on: errors, progress, processes, files, the run folder, statistics.

It knows nothing of language models, facts or traces, and imports nothing else of crosstrace."""
