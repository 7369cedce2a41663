"""Facts and texts of a user, from tables and JSON, checked row by row, to a folder that a run can teach."""
