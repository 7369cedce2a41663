"""What results.json holds, as typed records: one schema that is written, read and described in the docs."""
