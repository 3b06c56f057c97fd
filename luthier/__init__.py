"""The Luthier library: it works with no service around it and knows no database and no Celery."""
