"""Files and uploads: rows about bytes in storage, and storage's garbage."""
