"""One file a stage of a run: what it does for one model, its record, its memory and its operations."""
