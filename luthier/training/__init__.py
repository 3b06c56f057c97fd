"""The training child: files in, files and event lines out. Never a database, HTTP or Celery."""
