"""Where studies are kept: SQLite by default, any database that SQLAlchemy speaks to by its URL."""
