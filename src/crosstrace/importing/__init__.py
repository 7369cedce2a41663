"""Facts and texts of one's own, from tables and JSON, checked row by row, into a folder that a run can be taught."""
